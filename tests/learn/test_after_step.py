import os
import signal
from pathlib import Path

import pytest
import torch

from clipft.config import Every
from clipft.learn.after_step import AfterStep, select_value
from clipft.learn.journal import Journal, clock
from clipft.learn.losses import LocalGradients
from clipft.learn.metrics_file import MetricsFile, read_rows
from clipft.learn.module import StepRecord
from clipft.learn.stop import StopRequest, Timer


def record(step: int) -> StepRecord:
    zero = torch.zeros(())
    return StepRecord(
        step, 1e-5, LocalGradients(zero, torch.zeros(1, 1), torch.zeros(1, 1), zero, zero), zero + 14, zero + 2
    )


def journal(path: Path) -> Journal:
    return Journal(MetricsFile(path, 0), [], lambda text: None, batch_size=100, num_steps=10, first_step=0)


def after_step(tmp_path: Path, max_bad_frac: float) -> AfterStep:
    never = Timer(Every(steps=10**9))
    return AfterStep(
        tmp_path,
        journal(tmp_path / "metrics.csv"),
        save=never,
        evaluate=never,
        validate=dict,
        validate_first=False,
        select="mean_recall@1",
        keep=2,
        max_bad_frac=max_bad_frac,
        lag=0,
    )


def test_too_many_unusable_samples_stop_the_run_with_the_reasons(tmp_path):
    callback = after_step(tmp_path, max_bad_frac=0.05)
    callback.reasons.update(image_truncated=11)
    callback.num_seen, callback.num_dropped = 190, 11
    callback._check_dropped()  # too few samples to speak of a rate
    callback.num_seen = 210
    with pytest.raises(ValueError, match=r"11 of the first 210 .*image_truncated 11.*data\.max_bad_frac=0\.05"):
        callback._check_dropped()
    after_step(tmp_path, max_bad_frac=0.5)._check_dropped()


def test_the_journal_writes_a_row_per_step_and_shows_the_loss_beside_chance(tmp_path, capsys):
    book = journal(tmp_path / "metrics.csv")
    for step in range(1, 11):
        book.step(record(step), loss=4.0, shared=3, dropped=1, wait_s=0.1, total_s=0.5)
        if step == 5:
            book.validation(5, {"text_to_image_recall@1": 0.25}, "mean_recall@1 0.2500", "0.2500 at 5")
        book.write()
    rows = read_rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert rows[4]["val/text_to_image_recall@1"] == "0.25" and rows[5]["val/text_to_image_recall@1"] == ""
    assert rows[0]["train/samples_per_s"] == "200" and rows[0]["train/data_wait_frac"] == "0.2"
    last = capsys.readouterr().err.splitlines()[-1]
    assert "step 10/10  loss 4.000 (chance 4.605)  scale 14.0  lr 1.00e-05  200 samples/s  data wait 20%" in last
    assert "dropped 10" in last


def test_ranks_other_than_the_first_write_nothing(tmp_path, capsys):
    book = Journal(None, [], lambda text: None, batch_size=100, num_steps=10, first_step=0)
    book.step(record(10), loss=4.0, shared=0, dropped=0, wait_s=0.1, total_s=0.5)
    book.write()
    book.print("hello")
    assert capsys.readouterr().err == ""


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
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT and codes == []
        signal.raise_signal(signal.SIGINT)
        assert codes == [130]
    finally:
        stop.uninstall()
    assert signal.getsignal(signal.SIGINT) == before


def test_clock_is_short_for_short_times():
    assert [clock(seconds) for seconds in (7.0, 754.0, 10931.0)] == ["0:07", "12:34", "3:02:11"]
