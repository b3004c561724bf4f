"""model.image_size, context_length, patch_dropout and grad_checkpointing; open_clip's create_model is the oracle."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from weight_files import OPENAI, OPENAI_RESNET, drawn, features, model

from clipft.capacity import full_length_batch
from clipft.fit import towers_of
from clipft.learn.losses import build_loss
from clipft.learn.step import Tower, Towers, contrastive_backward
from clipft.model.build import Clip, build_model, description
from clipft.model.load import load_model

TIMM = {
    **OPENAI,
    "custom_text": True,
    "vision_cfg": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"},
}
LARGE = pytest.mark.process  # no processes, but five million weights
CONVNEXT = {**OPENAI, "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": ""}}


def save_folder(clip: Clip, path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "open_clip_config.json").write_text(json.dumps(description(clip)))
    state = {name: value.contiguous() for name, value in clip.model.state_dict().items()}
    save_file(state, path / "open_clip_model.safetensors")
    return path


def plain(folder: Path, **force: Any) -> Any:
    import open_clip

    return cast(Any, open_clip.create_model)(f"local-dir:{folder}", require_pretrained=True, **force)


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("size, length", [(48, 10), (16, 24)], ids=["larger and shorter", "smaller and longer"])
def test_sizes_are_those_that_open_clip_makes_of_the_same_weights(tmp_path, custom_text, size, length):
    folder = save_folder(drawn({**OPENAI, "custom_text": custom_text}), tmp_path / "base")
    theirs = plain(folder, force_image_size=size, force_context_length=length)
    loaded = load_model(model(folder, image_size=size, context_length=length), 0)
    assert_close(loaded.model.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert_close(features(loaded), features(loaded, theirs), rtol=0, atol=0)
    assert loaded.preprocess_cfg["size"] == [size, size] and loaded.tokenize(["a"]).shape == (1, length)
    said = " ".join(loaded.notes)
    assert f"images of {size} pixels, captions of {length} tokens" in said
    assert f"interpolated from 4 x 4 to {size // 8} x {size // 8} patches" in said
    assert f"stretched from 16 to {length} tokens" in said


@pytest.mark.parametrize("cfg, size", [pytest.param(TIMM, 384, marks=LARGE), (CONVNEXT, 96)], ids=["ViT", "ConvNeXt"])
def test_a_tower_of_timm_has_the_size_that_open_clip_gives_it(tmp_path, cfg, size):
    folder = save_folder(drawn(cfg), tmp_path / "base")
    theirs = plain(folder, force_image_size=size)
    loaded = load_model(model(folder, image_size=size), 0)
    assert loaded.preprocess_cfg["size"] == [size, size]
    assert_close(features(loaded), features(loaded, theirs), rtol=1e-4, atol=1e-5)
    again = plain(save_folder(loaded, tmp_path / "saved"))  # no word of the size: it is in the config
    assert_close(features(loaded), features(loaded, again), rtol=0, atol=0)
    assert any(f"set to {size} pixels" in note for note in loaded.notes)


@LARGE
def test_a_tower_that_timm_has_for_no_such_size_is_refused_with_those_it_has(tmp_path):
    folder = save_folder(drawn(TIMM), tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"model\.image_size=240 does not work with vit_tiny_patch16_224.*224, 384 pixels"
    ):
        load_model(model(folder, image_size=240), 0)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_the_nearest(tmp_path):
    folder = save_folder(drawn(OPENAI), tmp_path / "base")
    with pytest.raises(ValueError, match=r"model\.image_size=30 is no multiple of this tower's 8 pixels.*24 or 32"):
        load_model(model(folder, image_size=30), 0)


def test_a_resnets_positions_are_not_interpolated_and_it_says_so(tmp_path):
    folder = save_folder(drawn(OPENAI_RESNET), tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"attnpool\.positional_embedding.*does not interpolate.*leave model\.image_size"
    ):
        load_model(model(folder, image_size=96), 0)


@pytest.mark.parametrize("cfg", [OPENAI, pytest.param(TIMM, marks=LARGE)], ids=["open_clip's", "timm's"])
def test_patch_dropout_works_in_training_only_and_stays_with_the_model(tmp_path, cfg):
    folder = save_folder(drawn(cfg), tmp_path / "base")
    clip = load_model(model(folder, patch_dropout=0.5), 0)
    side = clip.preprocess_cfg["size"][0]
    pixels = torch.randn(2, 3, side, side)
    clip.model.train()
    torch.manual_seed(0)
    first, other = clip.model.encode_image(pixels), clip.model.encode_image(pixels)
    torch.manual_seed(0)
    assert torch.equal(clip.model.encode_image(pixels), first) and not torch.allclose(first, other)
    assert_close(features(clip), features(load_model(model(folder), 0)), rtol=0, atol=0)  # in evaluation
    again = save_folder(clip, tmp_path / "saved")
    kept = load_model(model(again), 0)
    assert kept.model_cfg["vision_cfg"]["patch_dropout"] == 0.5
    assert any("sees 50% of an image's patches" in note for note in kept.notes)
    off = load_model(model(again, patch_dropout=0.0), 0)
    assert "patch_dropout" not in off.model_cfg["vision_cfg"] and not any("patches" in note for note in off.notes)


def test_patches_drawn_on_the_device_are_on_a_cpu_those_of_open_clip(tmp_path):
    clip = load_model(model(save_folder(drawn(OPENAI), tmp_path / "base"), patch_dropout=0.5), 0)
    plain = build_model(clip.model_cfg)
    plain.load_state_dict(clip.model.state_dict())
    pixels = torch.randn(2, 3, *clip.preprocess_cfg["size"])
    found = []
    for each in (clip.model, plain):
        torch.manual_seed(3)
        found.append(each.train().encode_image(pixels))
    assert torch.equal(*found) and "PatchDropoutOnDevice" in str(clip.model.visual)


@pytest.mark.parametrize("name", ["tiny", "RN50-like"])
def test_patch_dropout_of_a_tower_without_patches_is_refused_instead_of_ignored(tmp_path, name):
    name = save_folder(drawn(OPENAI_RESNET), tmp_path / "base") if name != "tiny" else name
    with pytest.raises(ValueError, match=r"model\.patch_dropout=0\.5 would be ignored"):
        load_model(model(name, patch_dropout=0.5), 0)


def test_both_passes_of_a_micro_batch_see_the_same_patches(tmp_path):
    clip = load_model(model(save_folder(drawn(OPENAI), tmp_path / "base"), patch_dropout=0.5), 0)
    clip.model.train()
    towers, seen = towers_of(clip), []

    def watched(batch):
        seen.append(towers.image.encode(batch))
        return seen[-1]

    batch = full_length_batch(clip, 7)
    batch.pixels.copy_(torch.randint(0, 256, batch.pixels.shape, dtype=torch.uint8))
    contrastive_backward(
        Towers(Tower(watched), towers.text),
        clip.model.logit_scale,
        None,
        batch,
        loss=build_loss("clip", "share"),
        with_ids=True,
        batch_size=7,
        micro_batch=3,
        seed=(0, 5),
        backward=lambda loss: loss.backward(),
        no_sync=nullcontext,
    )
    assert [len(image) for image in seen] == [3, 3, 1, 3, 3, 1]
    assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:], strict=True))
    clip.model.eval()
    with torch.no_grad():
        assert not torch.allclose(towers.image.encode(batch)[:3], seen[0])  # patches were left out


def gradients(clip: Clip) -> dict[str, torch.Tensor]:
    side = clip.preprocess_cfg["size"][0]
    clip.model.train()
    torch.manual_seed(0)
    image = clip.model.encode_image(torch.randn(2, 3, side, side))
    text = clip.model.encode_text(clip.tokenize(["a", "two dogs"]))
    (image * text).sum().backward()
    return {n: p.grad for n, p in clip.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "cfg", [OPENAI, pytest.param(TIMM, marks=LARGE), CONVNEXT], ids=["ViT", "timm's ViT", "ConvNeXt"]
)
def test_gradients_are_the_same_when_activations_are_computed_again(tmp_path, cfg):
    folder = save_folder(drawn(cfg), tmp_path / "base")
    clips = [load_model(model(folder, patch_dropout=rate, grad_checkpointing=on), 0) for rate, on in cases(cfg)]
    expected, found = (gradients(clip) for clip in clips)
    assert found.keys() == expected.keys() and len(found) > 20
    assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert any("image and text tower are computed again" in note for note in clips[1].notes)


def cases(cfg: dict[str, Any]) -> list[tuple[float | None, bool]]:
    rate = None if cfg is CONVNEXT else 0.5  # its draws have to be repeated too
    return [(rate, False), (rate, True)]


def test_a_tower_that_cannot_compute_again_is_said(tmp_path):
    folder = save_folder(drawn(OPENAI_RESNET), tmp_path / "base")
    clip = load_model(model(folder, grad_checkpointing=True), 0)
    assert any("of the text tower are computed again" in n and "the other tower" in n for n in clip.notes)


def test_the_activation_of_a_run_or_folder_goes_before_that_of_the_architecture(tmp_path):
    """QuickGELU is on where the description beside the weights says so, off where it does not."""
    small = load_model(model("small"), 0)
    small.model_cfg["quick_gelu"] = True
    folder = save_folder(small, tmp_path / "quick")
    loaded = load_model(model("small", folder), 0)
    assert loaded.model_cfg["quick_gelu"] is True
    assert any("QuickGELU switched on" in note for note in loaded.notes)
    assert_close(loaded.model.state_dict(), small.model.state_dict(), rtol=0, atol=0)
