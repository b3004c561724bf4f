"""Towers and tokenizers of transformers, made small in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from weight_files import OPENAI, drawn, features, model

from clipft.model.build import Clip, build, description
from clipft.model.load import load_model
from clipft.model.options import keep_all_layers, set_checkpointing

ROBERTA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 40,
}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "pad_token_id": 1,
    "is_encoder_decoder": True,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 40,
}
M2M = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "is_encoder_decoder": True,
    "encoder_layerdrop": 0.5,
    "vocab_size": 40,
}
TOWERS = {
    "roberta": (ROBERTA | {"model_type": "roberta"}, {"hf_pooler_type": "mean_pooler"}),
    "xlm-roberta": (ROBERTA | {"model_type": "xlm-roberta"}, {"hf_pooler_type": "mean_pooler"}),
    "mt5": (T5 | {"model_type": "mt5"}, {"hf_pooler_type": "mean_pooler"}),
    "nllb": (M2M | {"model_type": "m2m_100"}, {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}),
}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "red", "circle", "two", "dogs", "run", "over", "grass"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(str(folder))


def tower(folder: Path, kind: str) -> dict[str, Any]:
    """The config of a CLIP with the text tower and the tokenizer of this folder."""
    folder.mkdir(exist_ok=True)
    config, options = TOWERS[kind]
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 12, "hf_proj_type": "mlp"}
    return {**OPENAI, "text_cfg": text | options, "custom_text": True}


@pytest.mark.parametrize("kind", TOWERS)
def test_gradients_reach_every_layer_at_every_step(tmp_path, kind):
    clip = build("x", tower(tmp_path / "tower", kind), {})
    keep_all_layers(clip)
    assert any("LayerDrop" in note for note in clip.notes) == (kind == "nllb")
    clip.model.train()
    for _ in range(8):  # a layer that is dropped half of the time would be missed
        clip.model.zero_grad()
        (clip.model.encode_text(clip.tokenize(["a red circle", "two dogs"])) ** 2).sum().backward()
        missed = [n for n, p in clip.model.text.named_parameters() if p.requires_grad and p.grad is None]
        assert not missed


@pytest.mark.parametrize("kind", TOWERS)
def test_activations_computed_again_give_the_same_gradients(tmp_path, kind):
    clip = build("x", tower(tmp_path / "tower", kind), {})
    keep_all_layers(clip)
    clip.model.train()
    found = []
    for on in (False, True):
        assert set_checkpointing(clip.model, on) == ["image", "text"]
        clip.model.zero_grad()
        torch.manual_seed(0)
        (clip.model.encode_text(clip.tokenize(["a red circle", "two dogs"])) ** 2).sum().backward()
        found.append({n: p.grad.clone() for n, p in clip.model.text.named_parameters() if p.grad is not None})
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def save_folder(clip: Clip, path: Path) -> Path:
    from safetensors.torch import save_file

    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps(description(clip)))
    save_file({n: v.contiguous() for n, v in clip.model.state_dict().items()}, path / "open_clip_model.safetensors")
    clip.tokenize.save_pretrained(str(path))  # pyright: ignore[reportFunctionMemberAccess]
    return path


@pytest.mark.parametrize("kind", TOWERS)
def test_a_folder_loads_as_plain_open_clip_loads_it(tmp_path, kind):
    import open_clip

    clip = build("x", tower(tmp_path / "tower", kind), {})
    folder = save_folder(clip, tmp_path / "folder")
    loaded = load_model(model(folder), 0)
    plain = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    assert_close(features(loaded), features(loaded, plain), rtol=0, atol=0)
    assert_close(features(loaded), features(clip), rtol=0, atol=0)
    texts = ["a red circle", "two dogs run over grass"]
    assert torch.equal(loaded.tokenize(texts), open_clip.get_tokenizer(f"local-dir:{folder}")(texts))


def test_captions_longer_than_a_tower_has_positions_are_refused(tmp_path):
    folder = save_folder(build("x", tower(tmp_path / "tower", "roberta"), {}), tmp_path / "folder")
    assert load_model(model(folder, context_length=20), 0).tokenize(["a"]).shape == (1, 20)
    with pytest.raises(ValueError, match=r"model\.context_length=50: this text tower has 40 positions"):
        load_model(model(folder, context_length=50), 0)


def test_a_clip_of_ours_needs_nothing_of_transformers():
    assert drawn(OPENAI).tokenize(["a"]).shape == (1, 16)
