"""JSON of every shape, among it hostile ones."""

import json
from pathlib import Path

import pytest
from forms import captioned, put_images, run

from clipft.data.rows import by_reason
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Row

ITEMS = captioned(4)


def test_rows_that_are_nested_null_or_no_objects_are_left_out_by_line(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    deep = "[" * 100_000 + "]" * 100_000
    lines = [
        '{"image": "0.jpg", "caption": "fine", "more": {"a": [1, {"b": null}]}}',
        '{"image": {"path": "1.jpg"}, "caption": "x"}',
        '{"image": "1.jpg", "caption": null}',
        '{"image": "1.jpg", "caption": {"en": "x"}}',
        '{"image": "1.jpg", "caption": [null, "", 3]}',
        '{"image": "1.jpg", "caption": "x", "deep": ' + deep + "}",
        '{"image": "1.jpg", "caption": "\\ud800"}',
        "null",
        "[1]",
        '{"image": "2.jpg", "caption": "cut',
        '{"image": "2.jpg", "caption": "\\u0000"}',
        '{"image": ["2.jpg"], "caption": "x"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    report = run(tmp_path / "t.jsonl", tmp_path / "out")
    assert by_reason(report.rows.dropped) == {
        "no_image": [2, 12],
        "no_caption_or_label": [3, 4, 5, 11],
        "bad_json": [6, 10],
        "bad_utf8": [7],
        "not_an_object": [8, 9],
    }
    assert json.loads(report.rows.usable[0].rest) == {"image": "0.jpg", "more": {"a": [1, {"b": None}]}}


def test_lines_under_the_name_json_are_read_as_lines(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    (tmp_path / "t.json").write_text('{"image": "0.jpg", "text": "a"}\n{"image": "1.jpg", "text": "b"}\n')
    source = open_source(Ask(str(tmp_path / "t.json")))
    assert "JSON lines in t.json" in source.said and len(list(source.rows())) == 2


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is no JSON"),
        ("3", "unknown shape"),
        ('{"a": 3}', "unknown shape"),
        ('{"images": [{"filename": "0.jpg", "sentences": []}], "dataset": "x"}', "unknown shape"),
        ('{"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}', "no caption"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path: Path, text: str, says: str):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        open_source(Ask(str(tmp_path / "t.json")))


def test_rows_of_a_list_are_named_by_their_number(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    (tmp_path / "t.json").write_text('[{"image": "0.jpg", "text": "a"}, 3, {"image": "gone.jpg", "text": "b"}]')
    report = run(tmp_path / "t.json", tmp_path / "out")
    assert by_reason(report.rows.dropped) == {"not_an_object": [2], "image_missing": [3]}
    assert report.source.table == "t.json row"


def test_cocos_annotations_without_an_image_and_images_without_one_are_left_out(tmp_path: Path):
    put_images(tmp_path, ITEMS)
    images = [{"id": i, "file_name": f"{i}.jpg", "license": 4, "coco_url": "http://x"} for i in range(3)]
    annotations = [
        {"id": 7, "image_id": 0, "caption": "a"},
        {"id": 8, "image_id": 9, "caption": "b"},
        {"id": 9, "image_id": 1, "caption": " "},
        "broken",
        {"id": 10, "image_id": 0, "caption": "c"},
    ]
    (tmp_path / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    report = run(tmp_path / "captions_val2017.json", tmp_path / "out")
    assert by_reason(report.rows.dropped) == {"no_image": [2, 4], "no_caption_or_label": [3, "image 2"]}
    [row] = report.rows.usable
    assert isinstance(row, Row) and row.captions == ["a", "c"]
    assert json.loads(row.rest) == {"id": 0, "image": "0.jpg", "license": 4, "coco_url": "http://x"}
