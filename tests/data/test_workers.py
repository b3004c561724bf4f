"""Work by several processes: in order, with progress, and over soon when it fails."""

import time

import pytest

from clipft.config import DataConfig, PackConfig
from clipft.data import progress
from clipft.data.progress import Progress
from clipft.data.workers import map_items, num_workers
from clipft.report import CORES


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_items(workers: int):
    words = ["c", "a", "b"]
    assert map_items(str.upper, words, workers, Progress("x", "words", 3), "workers") == ["C", "A", "B"]


@pytest.mark.process
def test_an_error_ends_the_work_without_the_items_that_wait():
    began = time.monotonic()
    with pytest.raises(ValueError, match="non-negative"):
        map_items(time.sleep, [-1.0, *[0.5] * 200], 2, Progress("x", "naps", 201), "workers")
    assert time.monotonic() - began < 30  # all of it would take 50 s


def test_there_are_as_many_processes_as_asked_for_or_as_the_job_has_cores(monkeypatch):
    monkeypatch.setenv(CORES, "3")
    assert (num_workers(None), num_workers(2), num_workers(0)) == (3, 2, 0)


def test_a_negative_number_of_processes_is_refused():
    with pytest.raises(ValueError, match=r"^workers=-1 must be 0"):
        PackConfig(source="x", out="y", workers=-1)
    with pytest.raises(ValueError, match=r"^data\.workers=-1 must be 0"):
        DataConfig(workers=-1)


def test_progress_has_a_line_when_it_is_time_with_what_is_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    told = Progress("looking at", "images", 4)
    told.began -= 10
    told.add(1)
    told.add(3)
    told.end()
    assert capsys.readouterr().err == "looking at: 1 of 4 images after 0:10, about 0:30 left\n"


def test_on_a_terminal_one_line_is_drawn_over_and_taken_away(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "DRAW_EVERY_S", 0)
    monkeypatch.setenv("COLUMNS", "20")
    told = Progress("reading", "rows")
    told.add(1)
    told.add(1)
    told.end()
    assert capsys.readouterr().err == "\r\x1b[Kreading: 1 rows aft\r\x1b[Kreading: 2 rows aft\r\x1b[K"
