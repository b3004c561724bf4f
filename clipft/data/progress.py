"""How far long work is, on stderr: one line that is drawn over on a terminal, else a line every ten seconds."""

import shutil
import sys
import time
from contextlib import suppress

from clipft.report import clock

LINE_EVERY_S, DRAW_EVERY_S = 10.0, 0.2


class Progress:
    """Says how much of the work is done, and when the rest will be; nothing where it is done at once."""

    def __init__(self, doing: str, noun: str, total: int | None = None):
        self.doing, self.noun, self.total, self.done = doing, noun, total, 0
        self.draws = sys.stderr.isatty()
        self.period = DRAW_EVERY_S if self.draws else LINE_EVERY_S
        self.began = self.told = time.monotonic()
        self.drawn = False

    def add(self, number: int) -> None:
        self.done += number
        self.tell()

    def tell(self) -> None:
        """Writes a line where it is time for one."""
        now = time.monotonic()
        if now - self.told < self.period or self.done == self.total:
            return
        self.told = now
        if self.draws:
            put(f"\r\x1b[K{self.line(now)[: shutil.get_terminal_size().columns - 1]}")
            self.drawn = True
        else:
            put(f"{self.line(now)}\n")

    def line(self, now: float) -> str:
        """`now` is a time of time.monotonic()."""
        spent = now - self.began
        if self.total is None:
            return f"{self.doing}: {self.done:,} {self.noun} after {clock(spent)}"
        left = f", about {clock(spent / self.done * (self.total - self.done))} left" if self.done else ""
        return f"{self.doing}: {self.done:,} of {self.total:,} {self.noun} after {clock(spent)}{left}"

    def end(self) -> None:
        """Takes a drawn line away."""
        if self.drawn:
            put("\r\x1b[K")


def put(text: str) -> None:
    with suppress(OSError):  # a terminal that was closed must not end the work
        sys.stderr.write(text)
        sys.stderr.flush()
