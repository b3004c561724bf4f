"""When something is due again, and whether somebody asked us to stop."""

import os
import signal
import time
from types import FrameType
from typing import Any

from clipft.config import Every


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
    """Remembers a stop signal until all ranks have agreed on it; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        self.before: dict[int, Any] = {}

    def install(self) -> None:
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def uninstall(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            os._exit(128 + signal.SIGINT)  # Lightning would turn an exception into another exit code
        self.received = number
