import json
import math
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from weight_files import Payload, model

from clipft.model.build import build, description
from clipft.model.load import Source, add_bias, identify, load_model, with_activation
from clipft.model.names import architecture_cfg
from clipft.model.weights import Weights

TEXTS = ["a red circle", "two dogs run over wet grass"]
MICRO = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
}


def quick():
    """A CLIP with QuickGELU and a preprocessing of its own, as a tag may bring them."""
    torch.manual_seed(3)
    return build("micro", {**MICRO, "quick_gelu": True}, {"mean": [0.5] * 3, "resize_mode": "squash"})


def save_run(clip, path: Path, checkpoint="best") -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    (path / "model.json").write_text(json.dumps(description(clip)))
    torch.save({"state_dict": clip.model.state_dict(), "step": 7}, path / "checkpoints" / f"{checkpoint}.ckpt")
    return path


def save_folder(clip, path: Path) -> Path:
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps(description(clip)))
    save_file(clip.model.state_dict(), path / "open_clip_model.safetensors")
    return path


def features(clip):
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return clip.model.encode_image(pixels), clip.model.encode_text(clip.tokenize(TEXTS))


def test_random_weights_follow_from_the_seed_and_leave_the_callers_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (load_model(model("tiny"), seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.head.proj.weight"], other["visual.head.proj.weight"])


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_our_architectures_are_small_and_have_no_statistics_that_would_stay_untrained(name):
    clip = load_model(model(name), 0)
    assert sum(parameter.numel() for parameter in clip.model.parameters()) < 10e6
    assert not any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in clip.model.modules())


def test_random_weights_are_said_to_be_random():
    assert any("random weights (seed 5)" in note for note in load_model(model("tiny"), 5).notes)


def test_a_model_has_fp32_weights_and_the_scale_that_clip_starts_with():
    clip = load_model(model("tiny"), 0)
    assert {value.dtype for value in clip.model.state_dict().values()} == {torch.float32}
    assert math.isclose(clip.model.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-6)


@pytest.mark.parametrize("checkpoint", ["best", "last", "7"])
def test_a_run_directory_gives_back_weights_activation_and_preprocessing(tmp_path, checkpoint):
    clip = quick()
    run = save_run(clip, tmp_path / "run", "step-00000007" if checkpoint == "7" else checkpoint)
    loaded = load_model(model(run, checkpoint=checkpoint), 0)
    assert_close(features(loaded), features(clip), rtol=0, atol=0)
    assert description(loaded) == description(clip)


def test_an_open_clip_folder_gives_back_weights_activation_and_preprocessing(tmp_path):
    clip = quick()
    loaded = load_model(model(save_folder(clip, tmp_path / "folder")), 0)
    assert_close(features(loaded), features(clip), rtol=0, atol=0)
    assert description(loaded) == description(clip)


def test_an_open_clip_folder_loads_as_plain_open_clip_loads_it(tmp_path):
    import open_clip
    from PIL import Image

    folder = save_folder(quick(), tmp_path / "folder")
    plain, _, preprocess = cast(Any, open_clip.create_model_and_transforms)(
        f"local-dir:{folder}", require_pretrained=True
    )
    loaded = load_model(model(folder), 0)
    assert_close(loaded.model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    image = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert torch.equal(loaded.preprocess(image), preprocess(image))
    assert torch.equal(loaded.tokenize(TEXTS), open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))


def test_weights_saved_with_quick_gelu_give_other_features_without_it():
    clip = quick()
    plain = build("micro", MICRO, {})
    plain.model.load_state_dict(clip.model.state_dict())
    for with_quick, standard in zip(features(clip), features(plain), strict=True):
        assert (with_quick - standard).abs().max() > 1e-3


def test_an_architecture_takes_the_activation_of_its_tag():

    cfg = architecture_cfg("ViT-B-32")
    assert with_activation(cfg, True)["quick_gelu"] is True
    assert "quick_gelu" not in with_activation(with_activation(cfg, True), False)
    assert with_activation({"quick_gelu": True}, None)["quick_gelu"] is True


@pytest.mark.parametrize(
    "name, said, openai, quick, note",
    [
        ("RN50", None, False, False, "GELU, as RN50 has it; for weights trained with QuickGELU.*model=RN50-quickgelu"),
        ("RN50-quickgelu", None, False, True, None),
        ("RN50", None, True, True, "QuickGELU switched on"),
        ("RN50", True, False, True, "QuickGELU switched on"),
        ("RN50-quickgelu", False, False, False, "QuickGELU switched off"),
        ("RN50-quickgelu", True, False, True, None),
    ],
)
def test_the_activation_follows_what_is_known_of_the_weights_and_is_said(name, said, openai, quick, note):
    source = Source(Path("w.pt"), "w.pt", preprocess_cfg=None if said is None else {}, quick_gelu=said)
    cfg, _, notes = identify(model(name, "w.pt"), source, Weights({}, openai=openai, mixed=False))
    assert bool(cfg.get("quick_gelu")) == quick
    assert bool(notes) == bool(note) and re.search(note or "", " ".join(notes))


def test_tokens_have_the_models_context_length_and_end_in_one_end_token():
    clip = load_model(model("tiny"), 0)
    tokens = clip.tokenize(["a dog", "word " * 100])
    assert tokens.shape == (2, clip.model.context_length)
    assert (tokens == tokens.max()).sum(dim=1).tolist() == [1, 1]


def test_a_custom_text_model_is_built_with_its_own_text_tower():
    import open_clip

    clip = build("x", {**MICRO, "custom_text": True}, {})
    assert isinstance(clip.model, open_clip.CustomTextCLIP)
    assert clip.model_cfg["custom_text"] is True


def test_a_timm_tower_is_built_without_any_download():
    cfg = {**MICRO, "custom_text": True}
    cfg["vision_cfg"] = {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": True,
        "image_size": 64,
        "timm_pool": "",
    }
    clip = build("x", cfg, {})
    assert clip.model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 24)
    assert clip.preprocess_cfg["size"] == [64, 64]


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_a_new_bias_is_in_the_model_in_its_description_and_in_what_plain_open_clip_loads(tmp_path, custom_text):
    import open_clip

    clip = build("micro", {**MICRO, "custom_text": custom_text}, {})
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    assert add_bias(clip, 33, keep_scale=False)
    assert (
        math.isclose(clip.model.logit_bias.item(), -math.log(32), rel_tol=1e-6) and clip.model.logit_bias.requires_grad
    )
    assert math.isclose(clip.model.logit_scale.exp().item(), 10, rel_tol=1e-6) and clip.model.logit_scale.requires_grad
    assert any("logit_bias of -3.47" in note for note in clip.notes)
    after = clip.model.state_dict()
    assert after.keys() - before.keys() == {"logit_bias"}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "logit_scale")
    fresh = build("micro", description(clip)["model_cfg"], {}).model
    assert_close((fresh.logit_scale, fresh.logit_bias), (clip.model.logit_scale, clip.model.logit_bias))
    run, folder = save_run(clip, tmp_path / "run"), save_folder(clip, tmp_path / "folder")
    plain, *_ = cast(Any, open_clip.create_model_and_transforms)(f"local-dir:{folder}", require_pretrained=True)
    for state in (plain.state_dict(), load_model(model(run), 0).model.state_dict()):
        assert_close(state, after, rtol=0, atol=0)


def test_a_new_bias_makes_the_odds_of_a_pair_those_of_chance():
    clip = build("micro", MICRO, {})
    before = clip.model.logit_scale.item()
    add_bias(clip, 64, keep_scale=True)
    assert clip.model.logit_scale.item() == before
    assert math.isclose(clip.model.logit_bias.sigmoid().item(), 1 / 64, rel_tol=1e-6)


def test_a_model_with_a_bias_keeps_it_and_its_scale():
    clip = build("micro", {**MICRO, "init_logit_scale": 3.0, "init_logit_bias": -9.0}, {})
    before = description(clip)
    assert not add_bias(clip, 64, keep_scale=False)
    assert (clip.model.logit_scale.item(), clip.model.logit_bias.item()) == (3.0, -9.0)
    assert description(clip) == before and not clip.notes


def test_another_models_checkpoint_is_refused_with_the_first_differences(tmp_path):
    run = save_run(quick(), tmp_path / "run")
    other = {**MICRO, "embed_dim": 8}
    (run / "model.json").write_text(json.dumps({"model_cfg": other, "preprocess_cfg": {}}))
    with pytest.raises(
        ValueError,
        match=r"best\.ckpt holds the weights of another model.*text_projection is \(16, 24\), not \(16, 8\)",
    ):
        load_model(model(run), 0)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None], ids=["empty", "html", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    run = save_run(quick(), tmp_path / "run")
    path = run / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:-100_000] if content is None else content)
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged"):
        load_model(model(run), 0)


def test_a_pickled_object_in_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = save_run(quick(), tmp_path / "run")
    torch.save({"state_dict": {}, "more": Payload()}, run / "checkpoints" / "best.ckpt")
    with pytest.raises(ValueError, match=r"best\.ckpt cannot be read"):
        load_model(model(run), 0)
    assert not Path("payload-ran").exists()


def test_a_folder_without_weights_is_refused_instead_of_drawn_at_random(tmp_path):
    folder = save_folder(quick(), tmp_path / "folder")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: put one of open_clip_model\.safetensors"):
        load_model(model(folder), 0)


def test_a_folder_with_damaged_weights_or_config_is_named(tmp_path):
    folder = save_folder(quick(), tmp_path / "folder")
    (folder / "open_clip_model.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors is damaged: 6 bytes, a web page"):
        load_model(model(folder), 0)
    (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 24}}')
    with pytest.raises(ValueError, match=r'open_clip_config\.json must be JSON with "model_cfg"'):
        load_model(model(folder), 0)
