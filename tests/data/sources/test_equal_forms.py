"""The same set in every form, packed: the same samples, captions and labels in the same splits."""

from pathlib import Path

import pytest
from forms import WITH_CAPTIONS, WITH_LABELS, WITHOUT_SPLITS, captioned, content, expected, labelled, read, run


@pytest.mark.parametrize("form", WITH_CAPTIONS, ids=lambda form: form.__name__)
def test_captions_and_splits_are_those_of_the_set_whatever_its_form(tmp_path: Path, form, capsys):
    items = captioned()
    report = run(form(tmp_path / "source", items), tmp_path / "out")
    assert content(tmp_path / "out") == expected(items)
    assert not report.rows.dropped and capsys.readouterr().out.startswith("read as: ")


@pytest.mark.parametrize("form", WITHOUT_SPLITS, ids=lambda form: form.__name__)
def test_forms_without_splits_are_training_data(tmp_path: Path, form):
    items = captioned()
    run(form(tmp_path / "source", items), tmp_path / "out")
    assert content(tmp_path / "out") == expected(items, splits=False)


@pytest.mark.parametrize("form", WITH_LABELS, ids=lambda form: form.__name__)
def test_labels_and_splits_are_those_of_the_set_whatever_its_form(tmp_path: Path, form):
    items = labelled()
    run(form(tmp_path / "source", items), tmp_path / "out")
    assert content(tmp_path / "out") == expected(items)
    assert (tmp_path / "out/classnames.txt").read_text() == "cat\ndog\neel\n"


def test_tables_of_the_same_rows_give_the_same_bytes(tmp_path: Path):
    items = captioned()
    shards = {}
    for form in (f for f in WITH_CAPTIONS if f.__name__ in ("jsonl", "json_list", "parquet")):
        run(form(tmp_path / form.__name__, items), tmp_path / f"{form.__name__}-out/set")
        out = tmp_path / f"{form.__name__}-out/set"
        shards[form.__name__] = [
            (path.name, path.read_bytes()) for path in sorted(out.iterdir()) if path.suffix == ".tar"
        ]
    assert shards["jsonl"] == shards["json_list"] == shards["parquet"] and len(shards["jsonl"]) == 3


def test_a_packed_set_packed_again_keeps_its_samples_and_names(tmp_path: Path):
    items = captioned()
    run(next(f for f in WITH_CAPTIONS if f.__name__ == "jsonl")(tmp_path / "source", items), tmp_path / "one")
    run(tmp_path / "one", tmp_path / "two")
    assert content(tmp_path / "two") == expected(items)
    names = [[sample["__key__"].partition("-")[2] for sample in read(tmp_path / out)] for out in ("one", "two")]
    assert sorted(names[0]) == sorted(names[1]) == sorted(str(i) for i in range(len(items)))
