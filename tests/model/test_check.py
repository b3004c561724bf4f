"""What is refused, and how, before torch is imported."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from weight_files import OPENAI, model

from clipft.model.check import check_model
from clipft.model.sources import base_run, beside, kind_of


def run_dir(path: Path) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    (path / "model.json").write_text(json.dumps({"model_cfg": OPENAI}))
    weights(path / "checkpoints" / "best.ckpt")
    return path


def weights(path: Path) -> Path:
    save_file({}, path)
    return path


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_kinds_are_told_apart(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    run = run_dir(tmp_path / "run")
    names = [str(run), str(folder), f"local-dir:{folder}", str(weights(tmp_path / "w.pt")), "tiny", "hf-hub:org/name"]
    assert [kind_of(name) for name in names] == ["run", "folder", "folder", "file", "architecture", "hub"]


def test_an_architecture_goes_before_a_file_of_its_name(tmp_path):
    weights(tmp_path / "tiny")
    assert kind_of("tiny") == "architecture" and kind_of("./tiny") == "file"


def test_an_architecture_in_another_spelling_is_answered_with_the_right_one():
    with pytest.raises(ValueError, match=r"model\.name='vit_b_32'.*Did you mean ViT-B-32"):
        check_model(model("vit_b_32"))
    with pytest.raises(ValueError, match="`clipft models` lists all"):
        check_model(model("qqqqqqq"))


def test_a_misspelt_tag_is_answered_with_the_closest_and_all_tags():
    with pytest.raises(ValueError, match=r"model\.pretrained='opnai'.*Did you mean openai\?.*laion2b_s34b_b79k"):
        check_model(model("ViT-B-32", "opnai"))


def test_tags_may_be_written_with_hyphens_and_capitals_as_open_clip_takes_them():
    check_model(model("ViT-B-32", "LAION2B-s34b-b79k"))


def test_a_tag_for_an_architecture_without_weights_names_the_way_out():
    with pytest.raises(ValueError, match=r"no weights for tiny.*model\.pretrained=null"):
        check_model(model("tiny", "openai"))


@pytest.mark.parametrize("key", ["model.name", "model.pretrained"])
def test_a_file_that_is_not_there_is_answered_with_those_of_about_its_name(tmp_path, key):
    weights(tmp_path / "epoch_12.pt")
    ask = {"model.name": ("./epoch_21.pt",), "model.pretrained": ("tiny", "./epoch_21.pt")}
    with pytest.raises(ValueError, match=rf"{key}='\./epoch_21\.pt' does not exist\. Did you mean epoch_12\.pt\?"):
        check_model(model(*ask[key]))
    with pytest.raises(ValueError, match="There is no folder nowhere either"):
        check_model(model("tiny", "nowhere/epoch_12.pt"))


def test_a_directory_of_neither_kind_says_what_was_looked_for_and_which_files_it_has(tmp_path):
    weights(tmp_path / "epoch_1.pt")
    for config in (model(tmp_path), model("tiny", tmp_path)):
        with pytest.raises(ValueError, match=r"config\.yaml and checkpoints.*open_clip_config\.json.*epoch_1\.pt"):
            check_model(config)


def test_a_damaged_file_is_named_before_torch_is_needed(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"<html>")
    for config in (model("./w.pt"), model("tiny", "./w.pt")):
        with pytest.raises(ValueError, match=r"w\.pt is damaged: 6 bytes, a web page"):
            check_model(config)
    run = run_dir(tmp_path / "run")
    (run / "checkpoints" / "best.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged: 0 bytes"):
        check_model(model(run))


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    run = run_dir(tmp_path / "run")
    for config in (model(run, checkpoint="7"), model("tiny", run, checkpoint="7")):
        with pytest.raises(ValueError, match=r"step-00000007\.ckpt does not exist.*there are: best"):
            check_model(config)


def test_pretrained_beside_a_model_with_weights_of_its_own_is_refused_instead_of_ignored(tmp_path):
    for name in (run_dir(tmp_path / "run"), weights(tmp_path / "w.pt"), "hf-hub:org/name"):
        with pytest.raises(ValueError, match=r"model\.pretrained='openai' would be ignored"):
            check_model(model(name, "openai"))


def test_a_repository_as_weights_is_answered_with_the_right_key():
    with pytest.raises(ValueError, match="Use model=hf-hub:org/name alone"):
        check_model(model("ViT-B-32", "hf-hub:org/name"))


def test_a_checkpoint_choice_without_a_run_directory_is_refused_instead_of_ignored(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    for config in (model("tiny", checkpoint="last"), model(tmp_path, checkpoint="last")):
        with pytest.raises(ValueError, match=r"model\.checkpoint='last'"):
            check_model(config)


def test_a_file_is_described_by_its_own_run_or_folder_only(tmp_path):
    run = run_dir(tmp_path / "run")
    assert beside(run / "checkpoints" / "best.ckpt") == run / "model.json"
    (run / "copies").mkdir()
    assert beside(weights(run / "copies" / "best.ckpt")) is None
    (run / "copies" / "open_clip_config.json").write_text("{}")
    assert beside(run / "copies" / "best.ckpt") == run / "copies" / "open_clip_config.json"


def test_the_run_that_weights_come_from_is_known_however_it_is_given(tmp_path):
    run = run_dir(tmp_path / "run")
    for config in (model(run), model("tiny", run), model(run / "checkpoints" / "best.ckpt")):
        assert base_run(config) == run
    for config in (model("tiny"), model("ViT-B-32", "openai"), model(weights(tmp_path / "w.pt"))):
        assert base_run(config) is None
