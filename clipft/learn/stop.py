"""When something is due again, and whether somebody asked us to stop."""

import os
import signal
import time
from types import FrameType
from typing import Any

from clipft.config import Every

# Why a run stops before its end, in the order of precedence, with its exit code.
STOPS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143, "train.max_time": 143}
STOPPED = frozenset(STOPS.values())


class Timer:
    """Tells when something is due again; durations run on this process's clock."""

    def __init__(self, every: Every):
        self.every, self.last = every, time.monotonic()

    def due_by_step(self, step: int) -> bool:
        return self.every.steps is not None and step % self.every.steps == 0

    def due_by_clock(self) -> bool:
        return self.every.seconds is not None and time.monotonic() - self.last >= self.every.seconds

    def restart(self) -> None:
        self.last = time.monotonic()


class StopRequest:
    """Remembers a stop signal until all ranks have agreed on it; a second Ctrl-C ends at once.

    SIGUSR1 is how Slurm announces the end of a job's time (sbatch --signal=USR1@120).
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.limit_s: float | None = None
        self.received = ""
        self.agreed = ""
        self.stepping = False  # outside of training steps there is nothing to save, and a signal ends at once
        self.before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over, also from whoever has taken them since the last time."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.before.setdefault(number, signal.signal(number, self._receive))

    def uninstall(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def wish(self) -> str:
        """Why this process would stop: a key of STOPS, or nothing."""
        out_of_time = self.limit_s is not None and time.monotonic() - self.began >= self.limit_s
        return self.received or ("train.max_time" if out_of_time else "")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.received == "SIGINT":
            os._exit(STOPS[name])  # Lightning would turn an exception into another exit code
        self.received = name
        if not self.stepping and not self.agreed:  # else the state that they agreed on is still being written
            self.agreed = name
            raise SystemExit(STOPS[name])
