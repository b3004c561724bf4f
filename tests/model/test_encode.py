from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from clipft.model import encode as module
from clipft.model.blocks import is_plain
from clipft.model.build import build, build_model
from clipft.model.encode import (
    can_trim,
    encode_image,
    encode_text,
    has_causal_tower,
    pools_class_token,
    to_float,
    trim_tokens,
)
from clipft.model.names import architecture_cfg, architecture_names

CAPTIONS = ["a", "a dog!!!", "two brown dogs run over wet grass"]
EOS = 49407  # of open_clip's tokenizer


def tiny(text=None, **change):
    torch.manual_seed(0)
    cfg = architecture_cfg("tiny")
    return build("tiny", {**cfg, "text_cfg": {**cfg["text_cfg"], "width": 32, **(text or {})}, **change}, {})


CAUSAL = {
    "CLIP": {},
    "CLIP with a projection with bias": {"text": {"proj_bias": True}},
    "CustomTextCLIP": {"custom_text": True},
    "CustomTextCLIP pooling at its end token": {
        "custom_text": True,
        "text": {"pool_type": "eos", "eos_id": EOS},
    },
    "CustomTextCLIP pooling at the first token": {"custom_text": True, "text": {"pool_type": "first"}},
    "CustomTextCLIP without projection": {"custom_text": True, "text": {"proj_type": "none", "width": 128}},
}
OTHER = {
    "bidirectional": {"custom_text": True, "text": {"no_causal_mask": True}},
    "pooling at the last position": {"custom_text": True, "text": {"pool_type": "last"}},
    "class token after the text": {"custom_text": True, "text": {"embed_cls": True}},
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("kind", CAUSAL)
def test_cut_captions_give_open_clips_features_and_gradients(kind):
    clip = tiny(**CAUSAL[kind])
    model, tokens = clip.model.double(), clip.tokenize(CAPTIONS)
    weight = torch.randn(3, 128, dtype=torch.float64)
    full = F.normalize(model.encode_text(tokens), dim=-1)
    expected = gradients(model, (full * weight).sum())
    cut = encode_text(model, tokens, trim=True)
    assert_close(cut, full, rtol=0, atol=1e-12)
    assert_close(gradients(model, (cut * weight).sum()), expected, rtol=1e-9, atol=1e-12)
    assert trim_tokens(model, tokens).shape[1] < tokens.shape[1]


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_towers_pooling_at_a_token_may_be_trimmed(kind):
    clip = tiny(**CAUSAL[kind])
    assert can_trim(clip.model, clip.tokenize)


@pytest.mark.parametrize("kind", OTHER)
def test_other_towers_keep_their_full_length(kind):
    clip = tiny(**OTHER[kind])
    assert not can_trim(clip.model, clip.tokenize)


def text_towers() -> dict[str, dict[str, Any]]:
    """The different text towers of open_clip and of ours, each with one layer, few words and hardly any images.

    Towers of transformers and the writing half of CoCa are left out: clipft never cuts the one nor builds the other.
    """
    towers: dict[str, dict[str, Any]] = {}
    for name in architecture_names():
        cfg = architecture_cfg(name)
        if "hf_model_name" in cfg["text_cfg"] or "multimodal_cfg" in cfg:
            continue
        text = {key: value for key, value in cfg["text_cfg"].items() if "tokenizer" not in key}
        tower = {
            "embed_dim": cfg["embed_dim"],
            "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1},
            "text_cfg": {**text, "layers": 1, "vocab_size": 100},
            **{key: cfg[key] for key in ("custom_text", "quick_gelu") if cfg.get(key)},
        }
        if tower not in towers.values():
            towers[name] = tower
    return towers


TOWERS = text_towers()


@pytest.mark.process  # no processes, but dozens of towers, of up to 20 million weights in float64
@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_of_open_clip_is_cut_exactly_or_not_at_all(name):
    import open_clip

    torch.manual_seed(0)
    cfg = {**TOWERS[name]}
    model = (open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg).double()
    tokens = torch.zeros(2, cfg["text_cfg"]["context_length"], dtype=torch.long)
    for row, stop in zip(tokens, (2, 6), strict=True):
        row[:stop] = torch.randint(3, 99, (stop,))
        row[stop] = cfg["text_cfg"]["eos_id"] if cfg["text_cfg"].get("pool_type") == "eos" else 99
    full = model.encode_text(tokens, normalize=True)
    with torch.no_grad():
        other_tail = tokens.where(torch.arange(tokens.shape[1]) <= 6, 50)
        sees_the_tail = bool((model.encode_text(other_tail, normalize=True) - full).abs().max() > 1e-12)
    assert has_causal_tower(model) != sees_the_tail
    if sees_the_tail:
        return
    weight = torch.randn_like(full)
    expected = gradients(model, (full * weight).sum())
    cut = encode_text(model, tokens, trim=True)
    found = gradients(model, (cut * weight).sum())
    assert trim_tokens(model, tokens).shape[1] == 7
    assert_close(cut, full, rtol=0, atol=1e-12)
    assert found.keys() == expected.keys() and len(found) > 10
    # The key bias of attention has no true gradient; the norm is that of query, key and value together.
    assert all((found[key] - value).norm() <= 1e-12 * value.norm() for key, value in expected.items())


VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
NARROWED = {
    "of CLIP": {},
    "with layer scale": {"ls_init_value": 0.3},
    "with its final norm after pooling": {"final_ln_after_pool": True},
    "without a norm before": {"no_ln_pre": True},
}
AS_BUILT = {
    "average": {"pool_type": "avg"},
    "attentional pool": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 4},
    "custom blocks": {"block_type": "custom", "qk_norm": True},
}


def vision(change: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    return build_model({"embed_dim": 24, "vision_cfg": VIT | change, "text_cfg": text}).double().eval()


@pytest.mark.parametrize("kind", [*NARROWED, *AS_BUILT])
def test_image_features_and_gradients_are_those_of_open_clip(kind):
    model = vision((NARROWED | AS_BUILT)[kind])
    assert pools_class_token(model.visual) == (kind in NARROWED)
    pixels, weight = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    full = model.encode_image(pixels, normalize=True)
    expected = gradients(model, (full * weight).sum())
    found = encode_image(model, pixels)
    assert_close(found, full, rtol=0, atol=1e-12)
    for name, value in gradients(model, (found * weight).sum()).items():
        assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # where attention has kernels of its own
        assert_close(encode_image(model, pixels), full, rtol=0, atol=1e-12)


def test_towers_that_were_changed_are_computed_as_they_are():
    model = vision({})
    block = model.visual.transformer.resblocks[1]
    block.attn = torch.nn.Sequential(block.attn)
    assert not pools_class_token(model.visual) and is_plain(model.transformer)


def test_the_last_block_is_computed_at_one_position_only():
    model, counts = vision({}), []
    for block in model.visual.transformer.resblocks:
        block.mlp.register_forward_hook(lambda _, inputs, output: counts.append(output.numel()))
    encode_image(model, torch.randn(3, 3, 16, 16, dtype=torch.float64))
    assert counts == [3 * 5 * 32, 3 * 5 * 32, 3 * 32]


def test_the_cut_is_after_the_longest_captions_end_though_a_caption_may_hold_the_padding_id():
    clip = tiny()
    start = EOS - 1
    tokens = torch.zeros(2, clip.model.context_length, dtype=torch.long)
    tokens[0, :3] = torch.tensor([start, 0, EOS])
    tokens[1, :6] = torch.tensor([start, 320, 0, 0, 0, EOS])  # 0 is "!" inside a word
    assert torch.equal(trim_tokens(clip.model, tokens), tokens[:, :6])


def test_tokens_cut_beforehand_give_the_same_features():
    clip = tiny()
    tokens = clip.tokenize(CAPTIONS)
    with torch.no_grad():
        cut = encode_text(clip.model, trim_tokens(clip.model, tokens), trim=False)
        assert_close(cut, encode_text(clip.model, tokens, trim=False), rtol=0, atol=1e-6)


def test_captions_in_groups_of_their_length_have_open_clips_features_and_gradients(monkeypatch):
    """In their own order, and each group with no more positions than its longest caption."""
    clip = tiny()
    model = clip.model.double()
    tokens = clip.tokenize(["dog " * (1 + 7 * i % 20) for i in range(40)])
    weight = torch.randn(40, 128, dtype=torch.float64)
    full = F.normalize(model.encode_text(tokens), dim=-1)
    expected = gradients(model, (full * weight).sum())
    shapes, outputs_at = [], module.outputs_at

    def noting(transformer, x, *rest):
        shapes.append(tuple(x.shape[:2]))
        return outputs_at(transformer, x, *rest)

    monkeypatch.setattr(module, "outputs_at", noting)
    found = encode_text(model, tokens, trim=True)
    assert shapes == [(8, 6), (8, 10), (8, 14), (8, 18), (8, 22)]
    assert_close(found, full, rtol=0, atol=1e-12)
    assert_close(gradients(model, (found * weight).sum()), expected, rtol=1e-9, atol=1e-12)
    encode_text(model, tokens[:15], trim=True)
    assert len(shapes) == 6  # fewer than two groups' worth stay together


def test_a_caption_longer_than_the_context_is_not_cut():
    clip = tiny()
    tokens = clip.tokenize(["word " * 100, "a"])
    assert trim_tokens(clip.model, tokens).shape == tokens.shape


def test_features_have_length_one_in_fp32_under_autocast():
    clip = tiny()
    pixels, tokens = torch.randn(2, 3, 64, 64), clip.tokenize(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for features in (encode_image(clip.model, pixels), encode_text(clip.model, tokens, trim=True)):
            assert features.dtype == torch.float32
            assert_close(features.norm(dim=-1), torch.ones(len(features)), rtol=0, atol=1e-6)


def test_a_bf16_model_takes_fp32_pixels():
    clip = tiny()
    features = encode_image(clip.model.bfloat16(), torch.randn(2, 3, 64, 64))
    assert features.dtype == torch.float32


def test_pixels_become_what_torchvision_makes_of_them():
    from PIL import Image
    from torchvision.transforms import Compose, Normalize, ToTensor

    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    oracle = Compose([ToTensor(), Normalize(mean, std)])
    expected = [oracle(Image.fromarray(one.numpy())) for one in pixels]
    for ours, theirs in zip(to_float(pixels.permute(0, 3, 1, 2), mean, std), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
