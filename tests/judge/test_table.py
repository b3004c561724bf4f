import io
import json
import re

import pytest

from clipft.judge.table import print_results

RECALL = "text_to_image_recall@1"
RANK = "image_to_text_median_rank"
GALLERY = {"images": 1000, "captions": 5000, "distinct_captions": 4970, "dropped": {"no_caption": 2}}


def printed(results: dict) -> str:
    file = io.StringIO()
    print_results(json.loads(json.dumps(results)), file)
    return file.getvalue()


def cells(text: str, metric: str) -> list[str]:
    line = next(line for line in text.splitlines() if metric in line)
    return [cell.strip() for cell in line.strip("|\n ").split("|")][1:]


@pytest.fixture
def results() -> dict:
    return {
        "base": {f"emoji/{RECALL}": 0.0312, f"emoji/{RANK}": 180.5, "eurosat/zero_shot_top1": 0.25},
        "best": {f"emoji/{RECALL}": 0.41237, f"emoji/{RANK}": 2.0, "eurosat/zero_shot_top1": 0.2},
        "last": {f"emoji/{RECALL}": 0.4, f"emoji/{RANK}": 2.0, "eurosat/zero_shot_top1": 0.19},
        "meta": {
            "split": "test",
            "gallery": {
                "emoji": GALLERY,
                "eurosat": {"labelled_images": 2700, "classes": 10, "dropped": {}, "split": "val"},
            },
        },
    }


def test_rows_hold_base_best_last_and_the_change_from_base_to_best(results):
    text = printed(results)
    assert cells(text, RECALL) == ["0.0312", "0.4124", "0.4000", "+0.3812"]
    assert cells(text, RANK) == ["180.5", "2.0", "2.0", "-178.5"]
    assert cells(text, "zero_shot_top1") == ["0.2500", "0.2000", "0.1900", "-0.0500"]
    header = next(line for line in text.splitlines() if "metric" in line)
    assert re.findall(r"\w+", header) == ["metric", "base", "best", "last", "change"]


def test_split_and_gallery_stand_above_each_data_set(results):
    lines = printed(results).splitlines()
    emoji = "emoji, test split: 1,000 images, 5,000 captions (4,970 distinct); dropped: 2 no_caption"
    assert emoji in lines
    assert "eurosat, val split: 2,700 labelled images in 10 classes" in lines
    order = [lines.index(emoji), *(i for i, line in enumerate(lines) if RECALL in line or "eurosat," in line)]
    assert order == sorted(order)


def test_the_table_is_ascii_without_control_codes_and_80_columns_wide(results, monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    text = printed(results)
    assert text.isascii() and text.replace("\n", "").isprintable()
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 80


def test_a_narrow_terminal_loses_nothing(results, monkeypatch):
    wide = printed(results)
    monkeypatch.setenv("COLUMNS", "20")
    assert printed(results) == wide


def test_a_run_without_base_has_no_change_and_absent_metrics_show_as_a_dash(results):
    del results["base"], results["last"][f"emoji/{RECALL}"]
    text = printed(results)
    assert cells(text, RECALL) == ["0.4124", "-"]
    assert "change" not in text


def test_only_a_base_can_be_shown():
    text = printed({"base": {f"emoji/{RECALL}": 0.5}})
    assert cells(text, RECALL) == ["0.5000"]
    assert "emoji" in text.splitlines()[0]


def test_a_single_measurement_is_one_column():
    text = printed({"model": {f"emoji/{RECALL}": 0.5}, "meta": {"gallery": {"emoji": GALLERY | {"split": "val"}}}})
    assert cells(text, RECALL) == ["0.5000"]
    assert text.startswith("emoji, val split: 1,000 images")


def test_markup_in_names_is_inert():
    assert "[red]x[/red]" in printed({"base": {f"[red]x[/red]/{RECALL}": 0.5}})
