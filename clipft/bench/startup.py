"""bench start: seconds until the command line answers, and until the first optimizer step is done."""

import subprocess
import sys
import time
from pathlib import Path

from clipft.bench.contenders import CLIPFT, Task, ours, theirs
from clipft.bench.report import Row, ratios, spread

ANSWERS = {
    "--help": (["train", "--help"], 0),
    "config error": (["train", "model=ViT-B-32", "train.batchsize=64"], 2),
}


def bench_start(task: Task, python: str | None, rounds: int) -> list[Row]:
    """Rows of seconds; the first step beside open_clip_train's where its Python is given, in turns."""
    rows: list[Row] = [
        {"what": what, "ours s": spread([answer(arguments, code, task.folder) for _ in range(rounds)])}
        for what, (arguments, code) in ANSWERS.items()
    ]
    mine, other = [], []
    for number in range(rounds):
        mine.append(ours(task, f"start-ours-{number}").step_ends[0])
        if python:
            other.append(theirs(task, f"start-theirs-{number}", python).step_ends[0])
    row: Row = {"what": "first step", "ours s": spread(mine)}
    rows.append(row | ({"open_clip s": spread(other), "ratio": ratios(other, mine)} if python else {}))
    return rows


def answer(arguments: list[str], code: int, folder: Path) -> float:
    """Seconds that the command takes to end with this exit code."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CLIPFT, *arguments], cwd=folder, capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode != code:
        raise RuntimeError(f"clipft {' '.join(arguments)} ended with {done.returncode}, not {code}:\n{done.stderr}")
    return seconds
