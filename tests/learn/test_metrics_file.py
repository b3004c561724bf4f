import csv

from clipft.learn.metrics_file import MetricsFile, read_rows


def test_each_row_is_on_disk_with_nine_digits_when_append_returns(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", last_step=0)
    file.append(1, {"train/loss": 1 / 3})
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n1,0.333333333\n"


def test_a_metric_that_comes_later_gets_a_column_and_leaves_the_earlier_rows_empty(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", last_step=0)
    file.append(1, {"train/loss": 1.0})
    file.append(2, {"train/loss": 2.0, "val/recall": 0.5})
    file.append(3, {"train/loss": 3.0})
    with (tmp_path / "metrics.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert [row["val/recall"] for row in rows] == ["", "0.5", ""]
    assert [row["train/loss"] for row in rows] == ["1", "2", "3"]


def test_reopening_cuts_back_to_the_saved_step(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, last_step=0)
    for step in range(1, 6):
        file.append(step, {"train/loss": float(step)})
    again = MetricsFile(path, last_step=3)
    again.append(4, {"train/loss": 40.0})
    assert [(row["step"], row["train/loss"]) for row in read_rows(path)] == [
        ("1", "1"),
        ("2", "2"),
        ("3", "3"),
        ("4", "40"),
    ]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, last_step=0)
    file.append(1, {"train/loss": 1.0, "train/scale": 14.0})
    file.append(2, {"train/loss": 2.0, "train/scale": 14.0})
    path.write_text(path.read_text()[:-4])
    again = MetricsFile(path, last_step=2)
    again.append(2, {"train/loss": 2.0, "train/scale": 14.0})
    assert [row["step"] for row in read_rows(path)] == ["1", "2"]
