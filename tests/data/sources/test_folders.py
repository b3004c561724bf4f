"""Folders of images: pairs, classes, splits, and what is neither."""

import json
import os
from pathlib import Path

import pytest
from forms import captioned, content, expected, labelled, put_images, run

from clipft.data.rows import by_reason
from clipft.data.sources.folders import split_folders, walk
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Bad, Row, Source

ITEMS = captioned(4)


def captions(source: Source) -> dict[str, list[str]]:
    return {Path(str(row.image)).name: row.captions for row in source.rows() if isinstance(row, Row)}


def test_a_json_beside_an_image_goes_before_a_txt_and_may_be_a_list_or_a_text(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    (tmp_path / "0.json").write_text('{"caption": "from json", "width": 3}')
    (tmp_path / "1.json").write_text('["one", "two"]')
    (tmp_path / "2.json").write_text('"a text"')
    (tmp_path / "3.json").write_text('{"width": 3}')
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("\ufefffrom txt\r\n\n second line \n")
    found = captions(open_source(Ask(str(tmp_path))))
    lines = ["from txt", "second line"]
    assert found == {"0.jpg": ["from json"], "1.jpg": ["one", "two"], "2.jpg": ["a text"], "3.jpg": lines}


def test_texts_that_cannot_be_read_and_images_without_one_are_left_out_by_name(tmp_path: Path):
    source = tmp_path / "source"
    put_images(source, captioned(9))
    for i in range(6):
        (source / f"{i}.txt").write_text("fine")
    (source / "1.txt").write_bytes("Mädchen".encode("latin-1"))
    (source / "2.txt").write_text("\n \n")
    (source / "3.json").write_text("{broken")
    report = run(source, tmp_path / "out")
    assert by_reason(report.rows.dropped) == {
        "bad_utf8": ["1.jpg"],
        "no_caption_or_label": ["2.jpg", "6.jpg", "7.jpg", "8.jpg"],
        "bad_json": ["3.jpg"],
    }


def test_a_text_that_cannot_be_opened_costs_its_image_alone(tmp_path: Path):
    put_images(tmp_path, ITEMS[:2])
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("fine")
    source = open_source(Ask(str(tmp_path)))
    (tmp_path / "0.txt").unlink()
    first, second = source.rows()
    assert first == Bad("0.jpg", "text_unreadable") and isinstance(second, Row)


def test_links_to_themselves_and_to_folders_above_do_not_stop_the_walk(tmp_path: Path):
    put_images(tmp_path / "cat", ITEMS[:2])
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "cat/self.jpg").symlink_to("self.jpg")
    (tmp_path / "cat/up").symlink_to("..")
    tree = walk(tmp_path, trusted=False)
    assert tree.images == ["cat/0.jpg", "cat/1.jpg"] and sum(tree.others.values()) == 2


def test_files_that_are_neither_image_nor_text_are_counted(tmp_path: Path):
    put_images(tmp_path / "cat", ITEMS)
    for name in ("cat/a.heic", "cat/b.HEIC", "README", "notes.txt", "cat/extra.json", ".hidden", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "cat/pipe.txt")
    source = open_source(Ask(str(tmp_path), format="classes"))
    assert source.notes == [
        "not read: 2 .heic, 1 .json without an image, 1 .txt without an image, 1 broken link or other special file, "
        "1 without a suffix"
    ]


def test_few_texts_among_images_in_folders_are_not_decided_by_clipft(tmp_path: Path):
    for item in labelled():
        put_images(tmp_path / str(item.label), [item])
    (tmp_path / "cat/0.txt").write_text("a note")
    with pytest.raises(ValueError, match=r"1 of 9 images have a text.*format=pairs.*or format=classes"):
        open_source(Ask(str(tmp_path)))
    assert len(captions(open_source(Ask(str(tmp_path), format="pairs")))) == 1
    rows = [row for row in open_source(Ask(str(tmp_path), format="classes")).rows() if isinstance(row, Row)]
    assert [row.label for row in rows] == ["cat"] * 3 + ["dog"] * 3 + ["eel"] * 3


def test_a_class_is_the_first_folder_however_deep_the_images_lie(tmp_path: Path):
    put_images(tmp_path / "source/train/sea lake/2020/may", ITEMS[:2])
    put_images(tmp_path / "source/test/forest", ITEMS[2:])
    report = run(tmp_path / "source", tmp_path / "out")
    assert report.packed.classnames == ["forest", "sea lake"] and set(report.packed.splits) == {"train", "test"}


@pytest.mark.parametrize(
    "tops, splits",
    [
        (["train", "val", "test"], {"train": "train", "val": "val", "test": "test"}),
        (["Training", "dev"], {"Training": "train", "dev": "val"}),
        (["train", "test", "extra"], {"train": "train", "test": "test", "extra": "extra"}),
        (["bus", "car", "train"], {}),
        (["train", "extra"], {}),
        (["train"], {"train": "train"}),
        (["cat"], {}),
    ],
)
def test_a_class_may_be_called_train(tops: list[str], splits: dict[str, str]):
    assert split_folders([f"{top}/x/1.jpg" for top in tops]) == splits


@pytest.mark.parametrize(
    "files, says",
    [
        ([], "0 images found, beside no other file"),
        (["1.heic", "2.heic"], "0 images found, beside 2 .heic"),
        (["1.jpg", "2.jpg"], "2 images found, beside no other file"),
    ],
)
def test_a_folder_that_is_nothing_known_says_what_it_holds_and_what_is_expected(tmp_path: Path, files, says: str):
    for name in files:
        (tmp_path / name).write_bytes(ITEMS[0].raw)
    with pytest.raises(ValueError) as error:
        open_source(Ask(str(tmp_path)))
    assert says in str(error.value) and "cat/1.jpg" in str(error.value)


def test_the_order_is_the_one_in_which_people_count(tmp_path: Path):
    names = ["b/2.jpg", "b/10.jpg", "a/1.jpg", "b/x1y20.jpg", "b/x1y3.jpg", "b/²1.jpg", "b/1².jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = walk(tmp_path, trusted=False).images
    assert found == ["a/1.jpg", "b/1².jpg", "b/2.jpg", "b/10.jpg", "b/x1y3.jpg", "b/x1y20.jpg", "b/²1.jpg"]


def test_columns_of_a_json_travel_along_and_labels_of_it_count(tmp_path: Path):
    source = tmp_path / "source"
    put_images(source, ITEMS)
    for item in ITEMS:
        text = json.dumps({"caption": item.captions, "label": "x", "split": item.split, "licence": "CC0"})
        (source / item.name).with_suffix(".json").write_text(text)
    report = run(source, tmp_path / "out")
    assert report.packed.classnames == ["x"]
    assert {json.loads(row.rest)["licence"] for row in report.rows.usable} == {"CC0"}
    assert content(tmp_path / "out").keys() == expected(ITEMS).keys()
