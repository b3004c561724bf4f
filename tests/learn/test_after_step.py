import os
import signal
from pathlib import Path

import pytest
import torch

from clipft.config import Every
from clipft.learn.after_step import select_value
from clipft.learn.journal import Journal, clock
from clipft.learn.losses import chance_loss
from clipft.learn.metrics_file import MetricsFile, read_rows
from clipft.learn.module import StepRecord
from clipft.learn.skips import Skips
from clipft.learn.stop import StopRequest, Timer
from clipft.report import RunFailed


def record(step: int, finite: list[bool] | None = None) -> StepRecord:
    zero, rows = torch.zeros(()), torch.tensor(finite or [True])
    return StepRecord(step, 1e-5, loss=zero, shared=zero, finite=rows, scale=zero + 14, norm=zero + 2, skipped=zero > 0)


def journal(path: Path) -> Journal:
    file = MetricsFile(path, 0)
    return Journal(
        file, [], lambda text: None, batch_size=100, chance=chance_loss("clip", 100), num_steps=10, first_step=0
    )


def shown() -> dict[str, float]:
    return {"loss": 4.0, "scale": 14.0, "lr": 1e-5, "grad_norm": 2.0}


def counts(**changed: int) -> dict[str, int]:
    return {"shared_positives": 3, "dropped": 1, "skipped": 0} | changed


def test_the_journal_writes_a_row_per_step_and_shows_the_loss_beside_chance(tmp_path, capsys):
    book = journal(tmp_path / "metrics.csv")
    for step in range(1, 11):
        book.step(step, shown(), counts(), wait_s=0.1, total_s=0.5)
        if step == 5:
            book.validation(5, {"text_to_image_recall@1": 0.25}, "mean_recall@1 0.2500", "0.2500 at 5")
        book.write(f"used {99 * step}  dropped {step}")
    rows = read_rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert rows[4]["val/text_to_image_recall@1"] == "0.25" and rows[5]["val/text_to_image_recall@1"] == ""
    assert rows[0]["train/samples_per_s"] == "200" and rows[0]["train/data_wait_frac"] == "0.2"
    assert rows[0]["train/shared_positives"] == "3" and rows[0]["train/skipped"] == "0"
    last = capsys.readouterr().err.splitlines()[-1]
    assert "step 10/10  loss 4.000 (chance 4.605)  eta 0:00  used 990  dropped 10  200 samples/s  data wait 20%" in last
    assert last.endswith("scale 14.0  lr 1.00e-05")


def test_rows_that_the_disk_refuses_wait_and_come_in_order(tmp_path, capsys):
    """A folder in the file's place refuses as a full disk does."""
    book = journal(tmp_path / "metrics.csv")
    book.step(1, shown(), counts(), wait_s=0.1, total_s=0.5)
    (tmp_path / "metrics.csv").mkdir()
    for step in (1, 2):
        book.step(step, shown(), counts(), wait_s=0.1, total_s=0.5)
        book.write("")
    assert capsys.readouterr().err.count("rows wait in memory") == 1
    assert book.file is not None
    (tmp_path / "metrics.csv").rmdir()
    (tmp_path / "metrics.csv").write_text(",".join(book.file.columns) + "\n")
    book.step(3, shown(), counts(), wait_s=0.1, total_s=0.5)
    book.write("")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["1", "2", "3"]


def test_ranks_other_than_the_first_write_nothing(tmp_path, capsys):
    book = Journal(None, [], lambda text: None, batch_size=100, chance=4.6, num_steps=10, first_step=0)
    book.step(10, shown(), counts(), wait_s=0.1, total_s=0.5)
    book.write("")
    book.print("hello")
    assert capsys.readouterr().err == ""


def test_a_step_that_is_left_out_names_its_samples_and_too_many_in_a_row_end_the_run():
    said: list[str] = []
    skips = Skips(2, said.append)
    skips.add(record(1, [True, False, True]), ["a", "b", "c"], skipped=True)
    assert "step 1 is left out" in said[0] and "features of b are not" in said[0]
    skips.add(record(2), ["a"], skipped=False)
    skips.add(record(3), ["a"], skipped=True)
    assert "in the backward pass" in said[1]
    with pytest.raises(RunFailed, match=r"2 steps in a row, up to step 4.*train\.max_skipped=2.*optim\.lr"):
        skips.add(record(4), ["a"], skipped=True)


def test_best_is_chosen_by_one_metric_or_the_mean_of_both_directions():
    metrics = {"text_to_image_recall@1": 0.2, "image_to_text_recall@1": 0.4, "zero_shot_top1": 0.9}
    assert select_value(metrics, "mean_recall@1") == pytest.approx(0.3)
    assert select_value(metrics, "zero_shot_top1") == 0.9
    with pytest.raises(ValueError, match=r"eval\.select='mean_recall@5'"):
        select_value(metrics, "mean_recall@5")


def test_timers_count_steps_or_seconds():
    steps, seconds = Timer(Every(steps=3)), Timer(Every(seconds=60.0))
    assert [step for step in range(1, 8) if steps.due_by_step(step)] == [3, 6] and not steps.due_by_clock()
    assert not seconds.due_by_clock() and not seconds.due_by_step(3)
    seconds.last -= 61
    assert seconds.due_by_clock()
    seconds.restart()
    assert not seconds.due_by_clock()


def test_a_stop_signal_is_remembered_and_a_second_interrupt_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    stop.install()
    try:
        stop.stepping = True
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT" and codes == []
        signal.raise_signal(signal.SIGINT)
        assert codes == [130]
    finally:
        stop.uninstall()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_outside_of_steps_a_stop_signal_ends_at_once_with_its_code(number, code):
    stop = StopRequest()
    stop.install()
    try:
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(number)
        assert ended.value.code == code and stop.agreed == signal.Signals(number).name
    finally:
        stop.uninstall()


def test_signals_are_given_back_after_being_taken_twice():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    stop.install()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library does that comes later
    stop.install()
    assert signal.getsignal(signal.SIGTERM) == stop._receive
    stop.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before


def test_clock_is_short_for_short_times():
    assert [clock(seconds) for seconds in (7.0, 754.0, 10931.0)] == ["0:07", "12:34", "3:02:11"]
