import subprocess
import sys
from pathlib import Path

import pytest
from weight_files import model

from clipft.model.check import check_model
from clipft.model.names import architecture_names, closest, tags_of

CONF = Path(__file__).parents[2] / "conf" / "model"


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
from clipft.model.check import check_model
from clipft.model.listing import list_models
check_model(ModelConfig(name="ViT-B-32", pretrained="openai"))
list_models([])
assert not {"torch", "open_clip"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_two_choices_are_joined_by_or_and_none_gives_an_empty_hint():
    assert closest("aab", ["aaa", "aac"]) == "aac or aaa"
    assert closest("xyz", ["aaa"]) == ""


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_curated_model_has_an_existing_name_and_tag(path):
    fields = dict(line.split(": ", 1) for line in path.read_text().splitlines())
    pretrained = None if fields["pretrained"] == "null" else fields["pretrained"]
    assert fields["name"] == path.stem
    check_model(model(fields["name"], pretrained))
