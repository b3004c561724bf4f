"""Shards of other tools, whole and damaged."""

import json
from pathlib import Path

import pytest
from forms import captioned, content, expected, labelled, run, tars
from shards import jpeg, write_tar

from clipft.data.rows import by_reason
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Row

ITEMS = captioned(9)


def downloaded(folder: Path, successes: int = 3) -> Path:
    """Two shards as img2dataset leaves them, the second of which it has not finished."""
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            row = {"caption": ITEMS[i].captions[0], "url": f"http://x/{i}", "key": f"{i:09d}", "status": "success"}
            row |= {"error_message": None, "width": 24, "height": 20, "exif": "{}", "sha256": "0" * 64}
            text = ITEMS[i].captions[0].encode()
            key = f"{i:09d}"
            members += [(f"{key}.jpg", ITEMS[i].raw), (f"{key}.txt", text), (f"{key}.json", json.dumps(row).encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": successes, "status_dict": {}}))
    return folder


def test_what_img2dataset_wrote_is_read_with_its_notes(tmp_path: Path):
    report = run(downloaded(tmp_path / "source"), tmp_path / "out")
    assert "WebDataset shards of img2dataset, 2 tars" in report.source.said and "caption=caption" in report.source.said
    assert report.source.notes == [
        f"{tmp_path}/source/00001.tar has no 00001_stats.json: img2dataset may not have finished it"
    ]
    row = report.rows.usable[4]
    assert row.key == "000005-000000004" and row.captions == [ITEMS[4].captions[0]]
    assert json.loads(row.rest)["url"] == "http://x/4"
    assert not list((tmp_path / "source").glob("*.index.json"))  # the source stays as it was


def test_a_shard_that_holds_less_than_img2dataset_wrote_down_is_named(tmp_path: Path):
    source = open_source(Ask(str(downloaded(tmp_path, successes=5))))
    assert source.notes[0] == f"{tmp_path}/00000.tar holds 3 samples, 00000_stats.json says 5"


def test_damage_is_named_with_its_byte_and_nothing_is_packed(tmp_path: Path):
    shard = tars(tmp_path / "source", ITEMS) / "train-000.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"train-000\.tar: .*\(byte \d+ of \d+\)"):
        run(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_that_the_index_leaves_out_are_counted_with_their_keys(tmp_path: Path):
    members = [("a.jpg", jpeg(0)), ("a.txt", b"a"), ("b.jpg", jpeg(1)), ("c.txt", b"c"), ("d.jpg", jpeg(2))]
    members += [("d.json", b"{broken"), ("e.jpg", b"no image"), ("e.txt", b"e"), ("a.jpg", jpeg(3)), ("a.txt", b"z")]
    members += [("f.jpg", jpeg(4)), ("f.txt", b"f")]
    write_tar(tmp_path / "source/x.tar", members)
    report = run(tmp_path / "source", tmp_path / "out")
    assert by_reason(report.rows.dropped) == {
        "bad_json": ["x/d"],
        "duplicate_key": ["x/a", "x/a (2)"],
        "no_text": ["x/b"],
        "no_image": ["x/c"],
        "format_not_allowed": ["x/e"],
    }
    assert report.rows.num_rows == 7


def test_labels_keep_their_names_and_numbers_without_names_are_packed_as_such(tmp_path: Path):
    source = tars(tmp_path / "source", labelled())
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == expected(labelled())
    (source / "classnames.txt").unlink()
    report = run(source, tmp_path / "numbers")
    assert report.packed.classnames == ["0", "1", "2"] and "no names" not in report.source.said
    assert report.source.notes == [f"labels are packed by number: there is no {source}/classnames.txt"]


def test_a_pattern_names_shards_too_and_other_splits_stay_out(tmp_path: Path):
    source = tars(tmp_path / "source", ITEMS)
    report = run(source / "t*.tar", tmp_path / "out")
    assert sum(len(part) for part in expected(ITEMS).values()) - 2 == len(report.rows.usable)
    assert list(report.packed.splits) == ["train"]


def test_of_two_caption_columns_in_json_the_user_chooses(tmp_path: Path):
    row = json.dumps({"caption": "one", "title": "two"}).encode()
    write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0)), ("a.json", row)])
    with pytest.raises(ValueError, match=r"columns\.caption=caption or columns\.caption=title"):
        open_source(Ask(str(tmp_path)))
    ask = Ask(str(tmp_path))
    ask.columns.caption = ["title"]
    [found] = open_source(ask).rows()
    assert isinstance(found, Row) and found.captions == ["two"]


def test_the_columns_read_from_json_are_said_and_nothing_of_shards_without_json(tmp_path: Path):
    row = json.dumps({"caption_0": "one", "caption_1": "two", "label": "cat"}).encode()
    write_tar(tmp_path / "json/x.tar", [("a.jpg", jpeg(0)), ("a.json", row)])
    write_tar(tmp_path / "txt/x.tar", [("a.jpg", jpeg(0)), ("a.txt", b"one")])
    said = open_source(Ask(str(tmp_path / "json"))).said
    assert said.startswith("read as: WebDataset shards, 1 tars, from json caption=caption_0,caption_1 label=label (")
    assert open_source(Ask(str(tmp_path / "txt"))).said.startswith("read as: WebDataset shards, 1 tars (")


def test_shards_of_another_name_beside_those_of_splits_are_no_training_data(tmp_path: Path):
    source = tars(tmp_path / "source", ITEMS)
    for name in ("extra-000.tar", "extra-001.tar"):
        write_tar(source / name, [(f"{name[8]}.jpg", jpeg(int(name[8]))), (f"{name[8]}.txt", b"x")])
    report = run(source, tmp_path / "out")
    assert {split: sum(shard.samples for shard in shards) for split, shards in report.packed.splits.items()} == {
        "train": 6,
        "val": 2,
        "test": 1,
        "extra": 2,
    }
