import time

import pytest
from huggingface_hub import constants

from clipft.config import ModelConfig
from clipft.model.load import load_model
from clipft.model.weights import find_tag_weights, hub_files

OPENAI = ModelConfig(name="ViT-B-32", pretrained="openai")
REPO = "timm/vit_base_patch32_clip_224.openai"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_weights_that_are_not_here_offline_are_named_with_the_way_to_get_them(empty_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as error:
        load_model(OPENAI, 0)
    said = str(error.value)
    for part in (
        "model.pretrained='openai'",
        "open_clip_model.safetensors",
        f"hf download {REPO}",
        "HF_HUB_OFFLINE is set",
    ):
        assert part in said
    assert str(empty_cache) in said


def test_a_hub_that_does_not_answer_is_reported_within_seconds(empty_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9 does not answer"):
        load_model(OPENAI, 0)
    assert time.monotonic() - start < 10


def test_weights_in_the_cache_are_used_without_asking_the_hub(empty_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = empty_cache / f"models--{REPO.replace('/', '--')}"
    file = folder / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert find_tag_weights("ViT-B-32", "openai", {"hf_hub": f"{REPO}/"}) == file


def test_every_tag_of_open_clip_has_a_repository_and_a_file_to_look_for():
    import open_clip

    for name, tag in open_clip.list_pretrained():
        repo, files = hub_files(open_clip.get_pretrained_cfg(name, tag))
        assert repo.count("/") == 1, (name, tag)
        assert all("/" not in file for file in files)
