"""Trials -> the table at the end of a sweep, results.csv, and the command that trains the best one again."""

import csv
import io
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from clipft.arguments import is_hydras, split_flags
from clipft.files import replace_file
from clipft.report import clock
from clipft.sweep.space import as_number
from clipft.sweep.trial import Trial

CSV = "results.csv"
STATUSES = ("finished", "out of time", "pruned", "failed", "waiting")  # in the order of the table
WIDTH = 2000  # never reached: a table that a terminal wraps can still be read, and a shortened number cannot


def best_first(trials: Iterable[Trial]) -> list[Trial]:
    """Those that count by value, then the pruned by value, then the others."""

    def key(trial: Trial) -> tuple[Any, ...]:
        place = 0 if trial.counts else STATUSES.index(trial.status)
        return place, -(trial.value if trial.value is not None else float("-inf")), trial.number

    return sorted(trials, key=key)


def write_csv(path: Path, trials: list[Trial], metric: str) -> None:
    """One row per trial, best first, every number with all its digits."""
    keys = keys_of(trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", f"val/{metric}", "step", "seconds", *keys, "error"])
    for trial in best_first(trials):
        shown = ["" if value is None else value for value in (trial.value, trial.step)]
        params = [trial.params.get(key, "") for key in keys]
        writer.writerow([trial.number, trial.status, *shown, f"{trial.seconds:.1f}", *params, trial.error])
    replace_file(path, text.getvalue())


def print_table(trials: list[Trial], metric: str) -> None:
    """The same in plain characters, with numbers of a width to read."""
    keys = keys_of(trials)
    table = Table(box=box.MARKDOWN)
    for name in ("trial", "status", f"val {metric}", "step", "time", *keys):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for trial in best_first(trials):
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        step = "-" if trial.step is None else str(trial.step)
        params = [short(trial.params.get(key, "-")) for key in keys]
        table.add_row(str(trial.number), trial.status, value, step, clock(trial.seconds), *params)
    Console(file=sys.stdout, width=WIDTH, markup=False, highlight=False).print(table)


def keys_of(trials: list[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.params))


def short(text: str) -> str:
    """A number with four digits where it has more; a word as it is."""
    number = as_number(text)
    rounded = text if number is None else f"{number:.4g}"
    return rounded if len(rounded) < len(text) else text


def command_of(trial: Trial, program: str, arguments: list[str], name: str) -> str:
    """A line for the shell that trains with the trial's settings, as a run of this name.

    `arguments` are those of the sweep as they were typed, to the program that was started as `program`.
    """
    flags, overrides = split_flags(arguments)
    flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
    dropped = {*trial.params, "name", "resume"}
    kept = [each for each in overrides if not is_hydras(each) and each.partition("=")[0] not in dropped]
    return shlex.join([*program_words(program), *flags, *kept, *trial.words(), f"name={name}"])


def program_words(program: str) -> list[str]:
    """How the shell starts the program again: the installed command, or Python with the script."""
    if not program.endswith(".py"):
        return ["clipft", "train"]
    on_path = shutil.which("python")
    same = on_path is not None and Path(on_path).absolute() == Path(sys.executable).absolute()
    return ["python" if same else sys.executable, program]
