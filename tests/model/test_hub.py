"""The Hugging Face cache, made up in a folder; the hub itself is never asked."""

import json
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.testing import assert_close
from weight_files import OPENAI, drawn, features, model

from clipft.model.build import description
from clipft.model.check import check_model, check_reachable
from clipft.model.hub import hub_files
from clipft.model.load import find_source, load_model
from clipft.model.names import architecture_names, pretrained_tags

OPENAI_TAG = model("ViT-B-32", "openai")
REPO = "timm/vit_base_patch32_clip_224.openai"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache: Path, repo: str, name: str) -> Path:
    """Where a file of the repository lies in the cache."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    file = folder / "snapshots" / "abc" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    return file


@pytest.mark.parametrize("ask", [check_reachable, lambda config: load_model(config, 0)], ids=["check", "load"])
def test_weights_that_are_not_here_offline_are_named_with_the_way_to_get_them(cache, ask):
    with pytest.raises(ValueError) as error:
        ask(OPENAI_TAG)
    said = str(error.value)
    named = ("model.pretrained='openai'", "open_clip_model.safetensors", f"hf download {REPO}", "HF_HUB_OFFLINE is set")
    assert all(part in said for part in (*named, str(cache)))


@pytest.mark.parametrize("config", [OPENAI_TAG, model("hf-hub:org/name")], ids=["tag", "repository"])
def test_a_hub_that_does_not_answer_is_reported_within_seconds(cache, monkeypatch, config):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{NOWHERE} does not answer"):
        check_reachable(config)
    assert time.monotonic() - start < 10


def test_weights_in_the_cache_are_used_without_asking_the_hub(cache):
    file = put(cache, REPO, "open_clip_model.safetensors")
    file.write_bytes(b"weights")
    check_reachable(OPENAI_TAG)
    source = find_source(OPENAI_TAG)
    assert source is not None and source.path == file and source.quick_gelu is True


def test_a_repository_of_the_hub_gives_model_weights_and_preprocessing(cache):
    clip = drawn(OPENAI)
    clip.preprocess_cfg["resize_mode"] = "squash"
    put(cache, "org/name", "open_clip_config.json").write_text(json.dumps(description(clip)))
    save_file(clip.model.state_dict(), put(cache, "org/name", "open_clip_model.safetensors"))
    config = model("hf-hub:org/name")
    check_model(config)
    check_reachable(config)
    loaded = load_model(config, 0)
    assert_close(features(loaded), features(clip), rtol=0, atol=0)
    assert description(loaded) == description(clip)
    assert "starts from open_clip_model.safetensors of org/name" in loaded.notes


def test_a_repository_that_lacks_its_weights_is_refused(cache):
    put(cache, "org/name", "open_clip_config.json").write_text(json.dumps({"model_cfg": OPENAI}))
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors .*huggingface\.co/org/name is not on this"):
        check_reachable(model("hf-hub:org/name"))


def test_a_cached_model_that_cannot_be_trained_is_refused_before_anything_is_loaded(cache):
    cfg = {**OPENAI, "multimodal_cfg": {}}
    put(cache, "org/coca", "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    put(cache, "org/coca", "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="CoCa"):
        check_reachable(model("hf-hub:org/coca"))


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:name", "hf-hub:org/name/file.bin", "hf-hub:org/"])
def test_what_is_no_repository_is_answered_with_the_spelling(name):
    with pytest.raises(ValueError, match="written hf-hub:org/name"):
        check_model(model(name))


def test_every_tag_has_the_place_that_open_clip_has_for_it():
    import open_clip

    for name in architecture_names():
        for tag, place in pretrained_tags().get(name, {}).items():
            assert place == open_clip.get_pretrained_cfg(name, tag)["hf_hub"], (name, tag)
            repo, files = hub_files(place)
            assert repo.count("/") == 1 and all("/" not in file for file in files), (name, tag)
