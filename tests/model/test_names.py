import subprocess
import sys
from pathlib import Path

import pytest

from clipft.config import ModelConfig
from clipft.model.names import architecture_names, check_model, closest, kind_of, tags_of

CONF = Path(__file__).parents[2] / "conf" / "model"


def model(name, pretrained=None, checkpoint="best"):
    return ModelConfig(name=str(name), pretrained=pretrained, checkpoint=checkpoint)


def run_dir(path: Path) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    return path


def test_architectures_are_those_of_open_clip_and_ours():
    import open_clip

    assert set(architecture_names()) == {*open_clip.list_models(), "tiny", "small"}


def test_tags_of_every_architecture_are_those_that_open_clip_lists():
    import open_clip

    for name in architecture_names():
        assert tags_of(name) == open_clip.list_pretrained_tags_by_model(name), name


def test_checking_a_model_imports_neither_torch_nor_open_clip():
    code = """
import sys
from clipft.config import ModelConfig
from clipft.model.names import check_model
check_model(ModelConfig(name="ViT-B-32", pretrained="openai"))
assert not {"torch", "open_clip"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_architecture_in_another_spelling_is_answered_with_the_right_one():
    with pytest.raises(ValueError, match=r"model\.name='vit_b_32'.*Did you mean ViT-B-32"):
        kind_of("vit_b_32")


def test_a_misspelt_tag_is_answered_with_the_closest_and_all_tags():
    with pytest.raises(ValueError, match=r"model\.pretrained='opnai'.*Did you mean openai\?.*laion2b_s34b_b79k"):
        check_model(model("ViT-B-32", "opnai"))


def test_tags_may_be_written_with_hyphens_and_capitals_as_open_clip_takes_them():
    check_model(model("ViT-B-32", "LAION2B-s34b-b79k"))


def test_a_tag_for_an_architecture_without_weights_names_the_way_out():
    with pytest.raises(ValueError, match=r"no weights for tiny.*model\.pretrained=null"):
        check_model(model("tiny", "openai"))


def test_two_choices_are_joined_by_or_and_none_gives_an_empty_hint():
    assert closest("aab", ["aaa", "aac"]) == "aac or aaa"
    assert closest("xyz", ["aaa"]) == ""


def test_run_directories_and_open_clip_folders_are_told_apart(tmp_path):
    run = run_dir(tmp_path / "run")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    assert kind_of(str(run)) == "run"
    assert kind_of(str(folder)) == "folder"
    assert kind_of("tiny") == "architecture"


def test_a_directory_of_neither_kind_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml and checkpoints.*open_clip_config\.json"):
        check_model(model(tmp_path))


def test_hub_ids_are_refused_with_the_download_command():
    with pytest.raises(ValueError, match="hf download org/name --local-dir"):
        check_model(model("hf-hub:org/name"))


def test_pretrained_beside_a_directory_is_refused_instead_of_ignored(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pretrained='openai' would be ignored"):
        check_model(model(run_dir(tmp_path / "run"), "openai"))


def test_a_checkpoint_choice_without_a_run_directory_is_refused_instead_of_ignored(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    for name in ("tiny", tmp_path):
        with pytest.raises(ValueError, match=r"model\.checkpoint='last'"):
            check_model(model(name, checkpoint="last"))


def test_coca_is_refused_by_name():
    with pytest.raises(ValueError, match=r"coca_ViT-B-32.*CoCa"):
        check_model(model("coca_ViT-B-32"))


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_curated_model_has_an_existing_name_and_tag(path):
    fields = dict(line.split(": ", 1) for line in path.read_text().splitlines())
    pretrained = None if fields["pretrained"] == "null" else fields["pretrained"]
    assert fields["name"] == path.stem
    check_model(model(fields["name"], pretrained))
