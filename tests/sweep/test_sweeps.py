"""Sweeps from their command to their table: trials that end well, badly, early, and again."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import Fault, read
from small import make_world
from strikes import fail, kill_supervisor, to_supervisor
from sweeps import Swept, base, start, sweep

import clipft
from clipft.config import Config
from clipft.learn.checkpoint import said_by
from clipft.rundir import load_config, read_results

pytestmark = pytest.mark.process
SEARCH = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optim.lr=tag(log, interval(1e-3, 1e-1))")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def calm(root: Path) -> Swept:
    """A search that nothing disturbs."""
    return sweep(root, "calm", *SEARCH)


def where_lr(lr: float, do):
    """Strikes the trial with this learning rate alone."""
    return lambda module, batch: do(module, batch) if module.plan.lr == lr else None


def test_a_grid_goes_on_after_a_trial_that_fails_and_the_same_command_tries_that_again(root):
    arguments = ("optim.lr=0.01,0.02", "train.batch_size=8,900")
    ended = sweep(root, "grid", *arguments, faults=(Fault(0, 5, where_lr(0.02, fail)),))
    assert ended.code == 1 and not ended.left, ended.stderr
    assert ended.statuses() == {0: "finished", 1: "failed", 2: "failed", 3: "failed"}
    assert next(row["trial"] for row in ended.rows()) == "0"
    assert (
        "trial 1 failed (optim.lr=0.01 train.batch_size=900): train.batch_size=900 is more than the 40" in ended.stdout
    )
    assert "trial 2 failed (optim.lr=0.02 train.batch_size=8): RuntimeError: a planted failure" in ended.stdout
    assert sorted(path.name for path in (ended.folder).glob("[0-9]*")) == ["0", "2"]  # no folder for what cannot be

    again = sweep(root, "grid", *arguments)
    assert again.code == 1 and again.statuses() == ended.statuses() | {2: "finished"}
    assert [step for _, lr, step in again.steps() if lr == 0.02] == [5, 6]  # from the state of step 4 on
    assert all(lr == 0.02 for _, lr, _ in again.steps())
    assert sorted(path.name for path in root.iterdir()) == ["data", "model", "notes", "runs"]


def test_the_value_of_a_trial_is_the_one_that_chose_its_best_weights(calm):
    assert calm.code == 0 and len(calm.rows()) == 4, calm.stderr
    for row in calm.rows():
        state = said_by(calm.folder / row["trial"] / "checkpoints" / "best.ckpt")
        assert (float(row["val/mean_recall@1"]), int(row["step"])) == (state["best_value"], state["step"])
    values = [float(row["val/mean_recall@1"]) for row in calm.rows()]
    assert values == sorted(values, reverse=True)
    assert (calm.folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_for_the_best_trial_makes_the_same_weights_again(root, calm):
    line = calm.stdout.splitlines()[-1]
    words = shlex.split(line)
    assert words[1:2] == ["train.py"] and words[-1] == "name=calm-best"
    ended = start(root, "best", command=["train", *words[2:]]).wait()
    assert ended.code == 0, ended.stderr
    best = read_results(calm.folder / calm.rows()[0]["trial"])
    assert read_results(root / "runs" / "calm-best")["best"] == best["best"]


def test_all_ranks_of_a_trial_have_its_rate_and_no_other_trial_has_it(root):
    ended = sweep(root, "ranks", *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", "trainer.devices=2")
    assert ended.code == 0 and not ended.left, ended.stderr
    rates = {float(row["optim.lr"]) for row in ended.rows()}
    assert len(rates) == 3
    seen = {
        (rank, lr): [s for r, rate, s in ended.steps() if (r, rate) == (rank, lr)] for rank in (0, 1) for lr in rates
    }
    assert all(steps == [1, 2, 3, 4, 5, 6] for steps in seen.values()) and len(ended.steps()) == 2 * 3 * 6


def test_a_search_that_was_killed_ends_like_one_that_was_not(root, calm):
    third = next(float(row["optim.lr"]) for row in calm.rows() if row["trial"] == "2")
    killed = sweep(root, "killed", *SEARCH, faults=(Fault(0, 4, where_lr(third, kill_supervisor)),))
    assert killed.code == -signal.SIGKILL and not killed.left
    again = sweep(root, "killed", *SEARCH)
    assert again.code == 0, again.stderr
    assert [(lr, step) for _, lr, step in again.steps()][:2] == [(third, 5), (third, 6)]
    assert sum(lr != third for _, lr, _ in again.steps()) == 6  # the fourth trial
    columns = ("trial", "status", "val/mean_recall@1", "step", "optim.lr")
    assert [[row[name] for name in columns] for row in again.rows()] == [
        [row[name] for name in columns] for row in calm.rows()
    ]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_the_running_trial_and_the_same_command_goes_on_from_there(root, number, code):
    name, arguments = f"stop-{code}", ("optim.lr=0.01,0.02",)
    ended = sweep(root, name, *arguments, faults=(Fault(0, 3, where_lr(0.01, to_supervisor(number))),))
    assert ended.code == code and not ended.left, ended.stderr
    assert ended.statuses() == {0: "waiting", 1: "waiting"}
    assert said_by(ended.folder / "0" / "checkpoints" / "last.ckpt")["step"] == 3
    assert "0 of 2 trials done" in ended.stdout.splitlines()[-1]
    again = sweep(root, name, *arguments)
    assert again.code == 0 and again.statuses() == {0: "finished", 1: "finished"}
    assert [step for _, lr, step in again.steps() if lr == 0.01] == [4, 5, 6]


def test_a_trial_out_of_time_counts_with_what_it_reached_and_the_sweep_goes_on(root):
    arguments = ("optim.lr=0.01,0.02", "train.max_time=0.001s", "eval.every=1")
    ended = sweep(root, "time", *arguments)
    assert ended.code == 0 and ended.statuses() == {0: "out of time", 1: "out of time"}, ended.stderr
    assert {row["step"] for row in ended.rows()} == {"1"}
    again = sweep(root, "time", *arguments)
    assert again.code == 0 and again.steps() == [] and again.rows() == ended.rows()


def test_a_trial_that_learns_less_than_the_others_is_stopped_with_its_state_and_is_no_failure(root):
    settings = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_startup_trials=1"]
    settings += ["hydra.sweeper.sampler=random", "hydra.sweeper.seed=69"]
    settings += ["optim.lr=tag(log, interval(1e-6, 3e-2))"]  # draws 1e-2, then 6e-6
    arguments = [*settings, "train.max_steps=20", "eval.every=5", "eval.select=mean_recall@5"]
    slow = Fault(0, 6, lambda module, batch: time.sleep(3.0) if module.plan.lr < 1e-5 else None)
    ended = sweep(root, "prune", *arguments, faults=(slow,))
    assert ended.code == 0 and ended.statuses() == {0: "finished", 1: "pruned"}, ended.stdout
    assert 5 <= said_by(ended.folder / "1" / "checkpoints" / "last.ckpt")["step"] < 20
    again = sweep(root, "prune", *arguments)
    assert again.code == 0 and again.steps() == [] and again.rows() == ended.rows()
    unpruned = sweep(root, "whole", *arguments, "hydra.sweeper.pruner=none")
    assert unpruned.statuses() == {0: "finished", 1: "finished"}


def joblib(root: Path, name: str, *words: str) -> list[str]:
    """A sweep whose trials joblib starts, in processes that import everything anew; so does this command."""
    settings = [f"name={name}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    given = {word.partition("=")[0] for word in words}
    shared = [each for each in base(root) if each.partition("=")[0] not in given]
    return [sys.executable, str(Path(clipft.__file__).parent.parent / "train.py"), "-m", *shared, *settings, *words]


def test_hydras_launchers_start_the_trials_as_they_like(root):
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", SEARCH[-1]]
    done = subprocess.run(joblib(root, "joblib", *search), cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((root / "runs" / "joblib" / "results.csv").read_text().splitlines()))
    assert sorted((row["trial"], row["status"]) for row in rows) == [("0", "finished"), ("1", "finished")]
    rates = {float(row["optim.lr"]) for row in rows}
    assert len(rates) == 2
    trained = {load_config(root / "runs" / "joblib" / name / "config.yaml", Config).optim.lr for name in "01"}
    assert trained == rates
    assert sorted(path.name for path in root.iterdir() if path.name != "notes") == ["data", "model", "runs"]


@pytest.mark.slow
@pytest.mark.parametrize("number, code, to_all", [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)])
def test_a_stop_reaches_the_trials_of_a_launcher_too(root, number, code, to_all):
    """A terminal sends Ctrl-C to all processes of the command; SIGTERM comes to the first alone."""
    folder = root / "runs" / f"far-{code}"
    words = joblib(root, folder.name, "optim.lr=0.01,0.02", "train.max_steps=100000", "eval.every=1000")
    command = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not all((folder / name / "checkpoints" / "last.ckpt").exists() for name in "01"):
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (os.killpg if to_all else os.kill)(command.pid, number)
        said, _ = command.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == code and "0 of 2 trials done" in said
    assert said.count("stopped, its state saved") == 2
    assert all("saved" in read(folder / name / "output.txt").splitlines()[-1] for name in "01")


def test_two_sweeps_do_not_share_a_folder(root):
    first = start(root, "shared", "optim.lr=0.01,0.02", faults=(Fault(0, 3, lambda module, batch: signal.pause()),))
    first.wait_for_fault()
    second = sweep(root, "shared", "optim.lr=0.01,0.02")
    first.process.kill()
    assert second.code == 2 and "by another process" in second.stderr, read(first.notes / "stderr")
    first.wait()
