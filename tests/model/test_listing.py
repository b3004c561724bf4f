import pytest

from clipft.cli import main
from clipft.model.listing import list_models
from clipft.model.names import architecture_names, tags_of


def test_every_architecture_has_a_line_with_all_its_tags():
    lines = list_models([]).splitlines()[1:]
    assert [line.split()[0] for line in lines] == architecture_names()
    for line in lines:
        name = line.split()[0]
        assert line.endswith(", ".join(tags_of(name)) or "no tags")


def test_words_choose_among_names_and_tags_whatever_their_case():
    assert [line.split()[0] for line in list_models(["DFN5B", "378"]).splitlines()[1:]] == [
        "ViT-H-14-378",
        "ViT-H-14-378-quickgelu",
    ]


def test_what_keeps_an_architecture_away_stands_before_its_tags():
    assert "[not supported: it is a CoCa model" in list_models(["coca_ViT-L-14"])


def test_a_word_that_nothing_has_is_answered_with_the_closest_name(capsys):
    with pytest.raises(ValueError, match=r"no architecture or tag has vitb32\. Did you mean ViT-B-32"):
        list_models(["vitb32"])
    assert main(["models", "vitb32"]) == 2
    assert main(["models", "ViT-B-32-256"]) == 0
    assert "ViT-B-32-256" in capsys.readouterr().out
