"""What a sweep says while it runs: a line for each start and end of a trial, and how far the running ones are."""

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from clipft.report import clock
from clipft.rundir import log
from clipft.sweep.results import CSV, write_csv
from clipft.sweep.trial import Running, Trial, best_of

LINE_EVERY_S = 60.0
DRAW_EVERY_S = 0.5


@dataclass
class Show:
    folder: Path
    metric: str
    draws: bool = field(default_factory=sys.stderr.isatty)
    shown: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Prints the text and adds it to the sweep's log."""
        with suppress(OSError):  # a terminal that was closed must not cost the states that are being saved
            if self.draws:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            print(text, flush=True)
        log(self.folder, text)

    def started(self, trial: Trial) -> None:
        self.say(f"trial {trial.number}  {' '.join(trial.words())}")

    def ended(self, trial: Trial, trials: list[Trial]) -> None:
        """Says how the trial ended, and brings results.csv up to date."""
        said = "stopped, its state saved" if trial.status == "waiting" else trial.status
        value = "" if trial.value is None else f", {trial.value:.4f} at step {trial.step}"
        error = f": {trial.error}" if trial.error else ""
        best = best_of(trials)
        so_far = f"; best {best.value:.4f} (trial {best.number})" if best and trial.counts else ""
        self.say(f"trial {trial.number}  {said}{error}{value} ({clock(trial.seconds)}){so_far}")
        with suppress(OSError):  # it is written again at the end
            write_csv(self.folder / CSV, trials, self.metric)

    def due(self) -> bool:
        """Whether it is time to say again how far the trials are."""
        return time.monotonic() - self.shown >= (DRAW_EVERY_S if self.draws else LINE_EVERY_S)

    def progress(self, running: Sequence[Running], trials: list[Trial], planned: int) -> None:
        """Draws over the last line of a terminal, or, where there is none, prints one."""
        self.shown = time.monotonic()
        done = sum(trial.over or trial.status == "failed" for trial in trials)
        line = f"{done} of {planned} trials done  " + "  ".join(where(each) for each in running)
        with suppress(OSError):
            if self.draws:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
            else:
                print(line, flush=True)


def where(running: Running) -> str:
    """Such as "trial 3: step 40 of 93, val 0.3120"."""
    first = running.job.ranks[0] if running.job else None
    if first is None or "step" not in first.said:
        return f"trial {running.trial.number}: starting"
    validation = first.validations[-1] if first.validations else None
    of = f" of {validation.of}, val {validation.value:.4f}" if validation else ""
    return f"trial {running.trial.number}: step {first.said['step']}{of}"
