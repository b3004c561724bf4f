"""What a sweep says while it runs: a line for each start and end of a trial, and how far the running ones are."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clipft.report import clock
from clipft.sweep.trial import Running, Trial, best_of

LINE_EVERY_S = 60.0
DRAW_EVERY_S = 0.5


@dataclass
class Show:
    log: Callable[[str], None]
    """Adds a line to the sweep's log."""
    draws: bool = field(default_factory=sys.stderr.isatty)
    shown: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        if self.draws:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        print(text, flush=True)
        self.log(text)

    def started(self, trial: Trial) -> None:
        self.say(f"trial {trial.number}  {' '.join(trial.words())}")

    def ended(self, trial: Trial, trials: list[Trial]) -> None:
        said = "stopped, its state saved" if trial.status == "waiting" else trial.status
        value = "" if trial.value is None else f", {trial.value:.4f} at step {trial.step}"
        error = f": {trial.error}" if trial.error else ""
        best = best_of(trials)
        so_far = f"; best {best.value:.4f} (trial {best.number})" if best and trial.counts else ""
        self.say(f"trial {trial.number}  {said}{error}{value} ({clock(trial.seconds)}){so_far}")

    def due(self) -> bool:
        """Whether it is time to say again how far the trials are."""
        return time.monotonic() - self.shown >= (DRAW_EVERY_S if self.draws else LINE_EVERY_S)

    def progress(self, running: Sequence[Running], trials: list[Trial], planned: int) -> None:
        """Draws over the last line of a terminal, or, where there is none, prints one."""
        self.shown = time.monotonic()
        done = sum(trial.over or trial.status == "failed" for trial in trials)
        line = f"{done} of {planned} trials done  " + "  ".join(where(each) for each in running)
        if self.draws:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line[:width]}")
            sys.stderr.flush()
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
