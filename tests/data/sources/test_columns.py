"""Columns are found by name or by looking, and two that fit equally well are never guessed between."""

import json
from pathlib import Path
from typing import Any

import pytest
from forms import captioned, put_images

from clipft.config import ColumnsConfig
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Bad, Row, Source

ITEMS = captioned(3)


def source_of(folder: Path, rows: list[dict], **columns) -> Source:
    put_images(folder, ITEMS)
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(Ask(str(folder / "table.jsonl"), columns=ColumnsConfig(**columns)))


def only_row(source: Source) -> Row:
    [row] = source.rows()
    assert isinstance(row, Row)
    return row


@pytest.mark.parametrize("image", ["img", "img_path", "Image Path", "filepath", "filename", "photo", "bild"])
@pytest.mark.parametrize("caption", ["caption", "text", "title", "Description", "beschreibung"])
def test_a_table_of_two_columns_needs_no_names_that_we_know(tmp_path: Path, image: str, caption: str):
    row = only_row(source_of(tmp_path, [{image: "0.jpg", caption: "a dog"}]))
    assert Path(str(row.image)).name == "0.jpg" and row.captions == ["a dog"]
    assert json.loads(row.rest) == {"image": "0.jpg"}


def test_numbered_columns_are_captions_together(tmp_path: Path):
    row = only_row(source_of(tmp_path, [{"image": "0.jpg", "caption_0": "a", "caption_1": "b", "caption_2": None}]))
    assert row.captions == ["a", "b"] and json.loads(row.rest) == {"image": "0.jpg"}


@pytest.mark.parametrize(
    "row, says",
    [
        ({"image": "0.jpg", "caption": "a", "title": "b"}, "columns.caption=caption or columns.caption=title"),
        ({"image": "0.jpg", "path": "1.jpg", "caption": "a"}, "columns.image=image or columns.image=path"),
        ({"left one": "0.jpg", "right": "1.jpg", "caption": "a"}, "columns.image='left one' or columns.image=right"),
        ({"image": "0.jpg", "class": "a", "category": "b"}, "columns.label=class or columns.label=category"),
        ({"image": "0.jpg", "split": "train", "subset": "val", "text": "x"}, "columns.split=split or columns.split="),
        ({"image": "0.jpg", "notes": "a", "remark": "b"}, "columns.caption=notes or columns.caption=remark"),
        ({"image": "0.jpg", "text": "a", "caption_1": "b"}, "columns.caption=text or columns.caption='[caption_1]'"),
        ({"image": "0.jpg", "id": 3, "size": 4}, "columns.label=COLUMN"),
        ({"picture": 3, "text": "a"}, "no column for the image"),
    ],
)
def test_two_columns_that_fit_equally_well_are_an_error_with_the_choices(tmp_path: Path, row: dict, says: str):
    with pytest.raises(ValueError) as error:
        source_of(tmp_path, [row])
    assert says in str(error.value)


def test_columns_of_which_no_row_uses_two_are_captions_together(tmp_path: Path):
    rows = [{"image": "0.jpg", "caption": "a"}, {"image": "1.jpg", "caption": "", "title": "b"}]
    assert [row.captions for row in source_of(tmp_path, rows).rows() if isinstance(row, Row)] == [["a"], ["b"]]


def test_a_column_without_values_is_no_candidate(tmp_path: Path):
    rows = [{"image": "0.jpg", "path": None, "caption": "a", "title": ""}]
    assert only_row(source_of(tmp_path, rows)).captions == ["a"]


def test_of_two_names_that_we_know_the_one_that_looks_like_an_image_is_it(tmp_path: Path):
    row = only_row(source_of(tmp_path, [{"image": 17, "path": "0.jpg", "caption": "a"}]))
    assert Path(str(row.image)).name == "0.jpg"
    assert json.loads(row.rest) == {"image": 17, "path": "0.jpg"}  # the name image is taken


def test_the_user_decides(tmp_path: Path):
    values = {"image": "0.jpg", "path": "1.jpg", "caption": "a", "title": "b", "kind": "cat", "part": "dev"}
    source = source_of(tmp_path, [values], image="path", caption=["title", "caption"], label="kind", split="part")
    row = only_row(source)
    assert (Path(str(row.image)).name, row.captions, row.label, row.split) == ("1.jpg", ["b", "a"], "cat", "val")
    assert "image=path caption=title,caption label=kind split=part" in source.said


def test_none_means_that_there_is_no_such_column(tmp_path: Path):
    values = {"image": "0.jpg", "text": "a", "label": "cat", "split": "val"}
    row = only_row(source_of(tmp_path, [values], caption="none", split="none"))
    assert (row.captions, row.label, row.split) == ([], "cat", None)
    assert json.loads(row.rest) == {"image": "0.jpg", "label": "cat", "split": "val"}  # no text to be taken for one


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"columns\.caption='captoin' is no column.*Did you mean caption\?"):
        source_of(tmp_path, [{"image": "0.jpg", "caption": "a"}], caption="captoin")


def test_class_and_category_are_labels_only_where_there_are_no_captions(tmp_path: Path):
    assert only_row(source_of(tmp_path, [{"image": "0.jpg", "category": "cat", "text": "a"}])).label is None
    assert only_row(source_of(tmp_path, [{"image": "0.jpg", "category": "cat", "note": "a"}])).label == "cat"


@pytest.mark.parametrize(
    "value, captions",
    [
        (["a", " b ", "", None, 3], ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("['it\\'s', \"b\"]", ["it's", "b"]),
        ("[sic] a dog", ["[sic] a dog"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['\\d']", ["\\d"]),
        ({"en": "a"}, []),
        (None, []),
        (float("nan"), []),
        (3, []),
    ],
)
def test_a_cell_holds_a_caption_or_a_list_of_them_written_in_any_way(tmp_path: Path, value, captions: list[str]):
    rows = list(source_of(tmp_path, [{"image": "1.jpg", "caption": "x"}, {"image": "0.jpg", "caption": value}]).rows())
    found = rows[1].captions if isinstance(rows[1], Row) else []
    assert found == captions
    assert captions or rows[1] == Bad(2, "no_caption_or_label")


@pytest.mark.parametrize("late", [{"split": "test"}, {"label": "cat"}, {"title": "b"}, {"path": "1.jpg"}])
def test_a_column_whose_first_value_comes_late_is_not_overlooked(tmp_path: Path, late: dict):
    """The first thousand rows decide: a split behind them would become training data."""
    rows = [{"image": f"{i % 3}.jpg", "caption": "a", "note": None} for i in range(1010)]
    rows[1005] |= late
    [(name, value)] = late.items()
    role = str({"title": "caption", "path": "image"}.get(name, name))
    with pytest.raises(ValueError, match=rf"column {name} has its first value in 1006.*columns\.{role}={name}"):
        list(source_of(tmp_path, rows).rows())
    given: dict[str, Any] = {role: ["caption", "title"] if role == "caption" else name}
    row = list(source_of(tmp_path, rows, **given).rows())[1005]
    assert isinstance(row, Row)
    found = {"split": row.split, "label": row.label, "caption": row.captions[-1], "image": Path(str(row.image)).name}
    assert found[role] == value
    if role in ("split", "label"):
        assert len(list(source_of(tmp_path, rows, **{role: "none"}).rows())) == 1010


def test_empty_cells_for_a_thousand_rows_are_no_reason_to_overlook_a_column(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    lines = [f"{i % 3}.jpg,a,{'cat' if i == 1100 else ''}" for i in range(1200)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,label", *lines]))
    with pytest.raises(ValueError, match="column label has its first value in 1102"):
        list(open_source(Ask(str(tmp_path / "t.csv"))).rows())


def test_other_columns_may_come_and_go(tmp_path: Path):
    rows = [{"image": "0.jpg", "caption": "a"}] * 1100 + [{"image": "0.jpg", "caption": "b", "licence": "CC0"}]
    assert len(list(source_of(tmp_path, rows).rows())) == 1101


def test_a_column_that_no_row_has_is_named_at_the_end_of_a_long_table(tmp_path: Path):
    rows = [{"image": "0.jpg", "caption": "a"}] * 1100
    with pytest.raises(ValueError, match=r"columns\.split='spilt' is no column"):
        list(source_of(tmp_path, rows, split="spilt").rows())
