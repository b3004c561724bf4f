"""Parquet and Hugging Face folders beyond what every form can hold."""

import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from forms import captioned, content, dataset, expected, labelled, picture, put_images, run

from clipft.data.rows import by_reason
from clipft.data.sources.place import Cell, read_place
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Row

ITEMS = captioned(6)


def write(path: Path, columns: dict[str, Any], rows_per_group: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


def test_plain_bytes_are_images_too_and_each_row_has_its_own(tmp_path: Path):
    """As img2dataset writes them with output_format=parquet."""
    texts = [item.captions[0] for item in ITEMS]
    path = write(tmp_path / "t.parquet", {"caption": texts, "jpg": [item.raw for item in ITEMS], "url": ["u"] * 6})
    rows = [row for row in open_source(Ask(str(path))).rows() if isinstance(row, Row)]
    assert [read_place(row.image) for row in rows] == [item.raw for item in ITEMS]
    assert [(row.image.group, row.image.row) for row in rows if isinstance(row.image, Cell)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]


def test_missing_images_and_captions_are_left_out_by_row(tmp_path: Path):
    raws = [ITEMS[0].raw, None, b"", ITEMS[3].raw, b"no image", ITEMS[5].raw]
    captions = ["a", "b", "c", None, "e", "f"]
    report = run(write(tmp_path / "t.parquet", {"image": raws, "caption": captions}), tmp_path / "out")
    assert by_reason(report.rows.dropped) == {
        "no_caption_or_label": [4],
        "no_image": [2, 3],
        "format_not_allowed": [5],
    }
    assert report.source.table == "t.parquet row"


def test_two_columns_of_bytes_are_not_guessed_between_and_the_other_does_not_travel(tmp_path: Path):
    raws = [item.raw for item in ITEMS]
    path = write(tmp_path / "t.parquet", {"before": raws, "after": raws[::-1], "text": ["x"] * 6})
    with pytest.raises(ValueError, match=r"columns\.image=before or columns\.image=after"):
        open_source(Ask(str(path)))
    ask = Ask(str(path))
    ask.columns.image = "after"
    source = open_source(ask)
    [first, *_] = [row for row in source.rows() if isinstance(row, Row)]
    assert read_place(first.image) == ITEMS[5].raw and first.rest == "{}" and "not before" in source.said


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_of_two_columns_of_bytes_the_one_with_an_images_name_is_read_in_both_forms(tmp_path: Path, form: str):
    raws = [item.raw for item in ITEMS]
    columns = {"jpg": raws, "mask": raws[::-1], "text": ["x"] * 6}
    if form == "parquet":
        path = write(tmp_path / "t.parquet", columns)
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    source = open_source(Ask(str(path)))
    [first, *_] = [row for row in source.rows() if isinstance(row, Row)]
    assert read_place(first.image) == ITEMS[0].raw and "images in column jpg, not mask" in source.said


def test_dates_and_numbers_travel_as_text_and_numbers(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    columns = {"image": ["0.jpg"], "text": ["x"], "when": [datetime.date(2020, 1, 2)], "size": [3], "big": [2**62]}
    [row] = open_source(Ask(str(write(tmp_path / "t.parquet", columns)))).rows()
    assert (
        isinstance(row, Row)
        and row.rest == '{"image": "0.jpg", "when": "2020-01-02", "size": 3, "big": 4611686018427387904}'
    )


def test_a_missing_label_is_minus_one_in_hugging_faces_sets(tmp_path: Path):
    items = labelled(4)
    whole = dataset(items)
    columns = {"image": whole["image"], "label": [0, -1, 2, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": whole.features["label"]})
    columns["image"] = [{"bytes": item.raw, "path": None} for item in items]
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    report = run(tmp_path / "saved", tmp_path / "out")
    assert by_reason(report.rows.dropped) == {"no_caption_or_label": [2]}
    assert [row.label for row in report.rows.usable] == ["dog", "eel", "cat"]
    assert [row.key for row in report.rows.usable] == ["000001", "000003", "000004"]


def test_a_set_that_was_shuffled_and_filtered_is_saved_in_that_order(tmp_path: Path):
    shuffled = dataset(ITEMS).select([4, 0, 2])
    shuffled.save_to_disk(str(tmp_path / "saved"))
    report = run(tmp_path / "saved", tmp_path / "out")
    assert [read_place(row.image) for row in report.rows.usable] == [ITEMS[i].raw for i in (4, 0, 2)]
    chosen = [ITEMS[i] for i in (4, 0, 2)]
    assert content(tmp_path / "out") == expected(chosen, splits=False)


def test_a_damaged_folder_of_hugging_face_is_refused(tmp_path: Path):
    dataset(ITEMS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved/dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="load_from_disk cannot read it"):
        open_source(Ask(str(tmp_path / "saved")))


def test_a_row_group_that_is_damaged_costs_its_images_and_no_others(tmp_path: Path):
    raws = [picture(i, size=(60, 60)) for i in range(6)]
    path = write(tmp_path / "t.parquet", {"image": raws, "caption": list("abcdef")})
    raw = bytearray(path.read_bytes())
    chunk = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    where = chunk.dictionary_page_offset or chunk.data_page_offset
    raw[where : where + 20] = b"\xff" * 20  # in the header of the page that holds the third image
    path.write_bytes(raw)
    report = run(path, tmp_path / "out")
    assert by_reason(report.rows.dropped) == {"read_error": [3, 4]}
    assert [read_place(row.image) for row in report.rows.usable] == [raws[i] for i in (0, 1, 4, 5)]
