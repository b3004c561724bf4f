"""Whole sweeps by fork: the command itself, with ranks that are forks too."""

import csv
import json
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import matplotlib.figure  # noqa: F401  # here, and not anew in each fork
import optuna  # noqa: F401
from jobs import LIMIT_S, Fault, enter, fork_ranks, members, read

import clipft.sweep.run  # noqa: F401
from clipft.cli import main

GONE_S = 20.0  # from the end of the command to that of its last process


@dataclass(frozen=True)
class Swept:
    """A sweep's command that is over."""

    folder: Path
    notes: Path
    code: int | None
    stdout: str
    stderr: str
    left: list[int]
    """Processes that were still there after the time they had."""

    def rows(self) -> list[dict[str, str]]:
        """results.csv."""
        return list(csv.DictReader((self.folder / "results.csv").read_text().splitlines()))

    def statuses(self) -> dict[int, str]:
        return {int(row["trial"]): row["status"] for row in self.rows()}

    def steps(self) -> list[tuple[int, float, int]]:
        """Rank, learning rate and number of each step that was begun, in the order in which they began."""
        lines = [json.loads(line) for line in read(self.notes / "keys").splitlines()]
        return [(line["rank"], line["lr"], line["step"]) for line in lines]


@dataclass
class Command:
    folder: Path
    notes: Path
    process: ForkProcess

    def wait(self) -> Swept:
        self.process.join(LIMIT_S)
        code = self.process.exitcode
        deadline = time.monotonic() + (GONE_S if code is not None else 0)
        sessions = lambda: {int(line) for line in read(self.notes / "sessions").split()}  # noqa: E731
        while (left := members(sessions())) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.join()
        out, err = read(self.notes / "stdout"), read(self.notes / "stderr")
        return Swept(self.folder, self.notes, code, out, err, left)

    def wait_for_fault(self) -> None:
        """Returns when the first fault has struck."""
        deadline = time.monotonic() + LIMIT_S
        while not read(self.notes / "struck"):
            assert time.monotonic() < deadline and self.process.is_alive(), read(self.notes / "stderr")
            time.sleep(0.02)


def sweep(root: Path, name: str, *arguments: str, faults: tuple[Fault, ...] = ()) -> Swept:
    return start(root, name, *arguments, faults=faults).wait()


def start(
    root: Path, name: str, *arguments: str, faults: tuple[Fault, ...] = (), command: list[str] | None = None
) -> Command:
    """Starts `clipft train -m` on the small model and data in root, as the sweep of this name, or another command."""
    attempts = root / "notes" / name
    notes = attempts / f"{len(list(attempts.glob('*'))):03d}"
    notes.mkdir(parents=True)
    given = {argument.partition("=")[0] for argument in arguments}
    shared = [each for each in base(root) if each.partition("=")[0] not in given]
    words = ["train", "-m", *shared, f"name={name}", *arguments]
    process = get_context("fork").Process(target=run, args=(root, notes, command or words, faults))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        process.start()
    return Command(root / "runs" / name, notes, process)


def base(root: Path) -> list[str]:
    """What all trials have in common: six steps, each second one validated and saved."""
    return [
        f"model={root}/model",
        f"data.path={root}/data/packed",
        "data.name=squares",
        "data.workers=0",
        "train.batch_size=8",
        "train.max_steps=6",
        "eval.every=2",
        "eval.base=false",
        "checkpoint.every=2",
        "trainer.accelerator=cpu",
    ]


def run(root: Path, notes: Path, words: list[str], faults: tuple[Fault, ...]) -> None:
    enter(notes, {})
    os.chdir(root)
    fork_ranks(notes, faults)
    sys.argv = ["train.py"]
    sys.exit(main(words))
