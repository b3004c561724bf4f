"""What a sweep leaves to read: table, results.csv, picture, command."""

import csv
import io
import math
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from clipft.sweep.grid import Grid
from clipft.sweep.plot import draw_panel, plot
from clipft.sweep.results import best_first, command_of, print_table, write_csv
from clipft.sweep.run import say_results
from clipft.sweep.show import Show
from clipft.sweep.space import parse_axes
from clipft.sweep.trial import Trial, best_of, failed

TRIALS = [
    Trial(0, {"optim.lr": "1e-05", "loss.name": "clip"}, "finished", 0.25, 40, 61.0),
    failed(Trial(1, {"optim.lr": "0.0012345678901", "loss.name": "clip"}), "no room, not even here"),
    Trial(2, {"optim.lr": "0.0003", "loss.name": "siglip"}, "finished", 0.5, 60, 62.0),
    Trial(3, {"optim.lr": "0.0001", "loss.name": "siglip"}, "pruned", 0.75, 20, 20.0),
    Trial(4, {"optim.lr": "2e-05", "loss.name": "clip"}, "out of time", 0.375, 50, 30.0),
    Trial(5, {"optim.lr": "5e-05", "loss.name": "clip"}),
    Trial(6, {"optim.lr": "6e-05", "loss.name": "clip"}, "finished", 0.5, 60, 62.0),
]


def test_the_best_comes_first_and_what_was_pruned_is_not_best():
    assert [trial.number for trial in best_first(TRIALS)] == [2, 6, 4, 0, 3, 1, 5]
    best = best_of(TRIALS)
    assert best and best.number == 2  # the first of equal ones
    assert best_of([TRIALS[1], TRIALS[3]]) is None


def test_results_csv_has_every_trial_with_all_digits(tmp_path):
    write_csv(tmp_path / "results.csv", TRIALS, "mean_recall@1")
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["2", "6", "4", "0", "3", "1", "5"]
    assert rows[5] == {
        "trial": "1",
        "status": "failed",
        "val/mean_recall@1": "",
        "step": "",
        "seconds": "0.0",
        "optim.lr": "0.0012345678901",
        "loss.name": "clip",
        "error": "no room, not even here",
    }


def test_the_table_shortens_numbers_and_no_words(capsys):
    print_table([*TRIALS, Trial(7, {"optim.lr": "1e-05", "loss.name": "w" * 90})], "mean_recall@1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 2 + 8 and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["trial", "status", "val mean_recall@1", "step", "time", "optim.lr", "loss.name"]
    assert cells[2] == ["2", "finished", "0.5000", "60", "1:02", "0.0003", "siglip"]
    assert cells[7] == ["1", "failed", "-", "-", "0:00", "0.001235", "clip"]
    assert cells[9][-1] == "w" * 90


@pytest.mark.parametrize(
    "program, arguments, expected",
    [
        (
            "/env/bin/clipft",
            ["-m", "model=tiny", "optim.lr=1,2"],
            "clipft train model=tiny optim.lr=0.0003 name=s-best",
        ),
        (
            "/env/bin/clipft",
            ["hydra/sweeper=optuna", "name=s", "--multirun", "resume=restart", "data.val=a b", "runs_dir=r"],
            "clipft train 'data.val=a b' runs_dir=r optim.lr=0.0003 name=s-best",
        ),
        (
            "/env/bin/clipft",
            ["--config-dir", "my conf", "-m", "hydra.sweeper.n_trials=3"],
            "clipft train --config-dir 'my conf' optim.lr=0.0003 name=s-best",
        ),
    ],
)
def test_the_command_holds_what_was_typed_and_the_trials_values(program, arguments, expected):
    trial = Trial(2, {"optim.lr": "0.0003"}, "finished", 0.5)
    assert command_of(trial, program, arguments, "s-best") == expected


def test_a_script_is_started_by_a_python_that_has_what_it_needs():
    words = command_of(Trial(2, {}), "train.py", ["-m", "model=tiny"], "x").split()
    assert words[1:] == ["train.py", "model=tiny", "name=x"]
    found = shutil.which(words[0])
    assert found and Path(found).resolve() == Path(sys.executable).resolve()


def panel(override: str, trials: list[Trial]):
    (axis,) = parse_axes([override], None)
    drawn = Figure().subplots()
    draw_panel(drawn, trials, axis)
    return drawn


def points(drawn) -> dict[str, list[list[float]]]:
    return {each.get_label(): each.get_offsets().data.tolist() for each in drawn.collections}


def test_numbers_are_drawn_where_they_are_and_failures_on_the_lower_edge():
    drawn = panel("optim.lr=tag(log, interval(1e-5, 1e-2))", TRIALS)
    assert drawn.get_xscale() == "log" and drawn.get_xlabel() == "optim.lr"
    assert points(drawn) == {
        "finished": [[1e-5, 0.25], [3e-4, 0.5], [6e-5, 0.5]],
        "out of time": [[2e-5, 0.375]],
        "pruned": [[1e-4, 0.75]],
        "failed": [[0.0012345678901, 0.03]],
        "best (trial 2)": [[3e-4, 0.5]],
    }
    far = [*TRIALS, failed(Trial(7, {"optim.lr": "0.01", "loss.name": "clip"}), "too fast")]
    low, high = panel("optim.lr=tag(log, interval(1e-5, 1e-2))", far).get_xlim()
    assert low < 1e-5 and high > 1e-2


def test_words_stand_side_by_side_in_the_order_in_which_they_were_given():
    drawn = panel("loss.name=siglip,clip", TRIALS)
    assert [text.get_text() for text in drawn.get_xticklabels()] == ["siglip", "clip"]
    assert points(drawn)["pruned"] == [[0, 0.75]] and points(drawn)["out of time"] == [[1, 0.375]]


def test_few_numbers_close_together_are_spread_evenly_and_each_is_written():
    trials = [Trial(n, {"train.batch_size": str(size)}, "finished", 0.5, 1) for n, size in enumerate((64, 128, 256))]
    drawn = panel("train.batch_size=64,128,256", trials)
    assert drawn.get_xscale() == "linear"
    assert [text.get_text() for text in drawn.get_xticklabels()] == ["64", "128", "256"]


@pytest.mark.parametrize("keys", [1, 2, 5])
def test_a_picture_has_a_panel_for_each_parameter(tmp_path, keys):
    axes = parse_axes([f"key_{n}=interval(0, 1)" for n in range(keys)], None)
    trials = [Trial(n, {axis.key: str(n / 4) for axis in axes}, "finished", n / 8, 1) for n in range(4)]
    plot(tmp_path / "results.png", trials, axes, "a $5 sweep", "mean_recall@1")
    raw = (tmp_path / "results.png").read_bytes()
    width, height = (int.from_bytes(raw[start : start + 4]) for start in (16, 20))
    assert raw[1:4] == b"PNG" and width == pytest.approx(min(keys, 3) * 4.4 * 130, abs=2)
    assert height == pytest.approx((math.ceil(keys / 3) * 3.6 + 0.8) * 130, abs=2)


def test_without_matplotlib_there_is_a_table_and_a_word_about_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    axes = parse_axes(["loss.name=siglip,clip"], None)
    grid = Grid(tmp_path, [TRIALS[0].params])
    grid.tell(TRIALS[0])
    say_results(grid, tmp_path, axes, "mean_recall@1", "train.py", [])
    assert "needs matplotlib (pip install matplotlib)" in capsys.readouterr().out
    assert (tmp_path / "results.csv").exists() and not (tmp_path / "results.png").exists()


def test_results_csv_is_up_to_date_and_a_closed_terminal_ends_nothing(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    show = Show(tmp_path, "mean_recall@1", draws=False)
    show.ended(TRIALS[0], TRIALS[:1])
    assert terminal.getvalue() == "trial 0  finished, 0.2500 at step 40 (1:01); best 0.2500 (trial 0)\n"
    (end, other) = os.pipe()
    os.close(end)
    with os.fdopen(other, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        show.ended(TRIALS[2], TRIALS[:3])
        with pytest.raises(BrokenPipeError):
            print("anything", flush=True)
        monkeypatch.undo()
        with suppress(BrokenPipeError):
            closed.close()
    assert "trial 2  finished" in (tmp_path / "log.txt").read_text()
    rows = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert [row["trial"] for row in rows] == ["2", "0", "1"]
