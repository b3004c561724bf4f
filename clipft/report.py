"""What a rank tells its supervisor over a pipe (how far it is, why it ends), and what it is told by its environment.

Nothing heavy is imported here.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PIPE = "CLIPFT_REPORT_FD"
CORES = "CLIPFT_CORES"


class RunFailed(RuntimeError):
    """The run cannot go on, though its settings and data are in order; the message says what to do."""


@contextmanager
def on_the_way() -> Iterator[None]:
    """Inside it a ValueError, such as one about data, fails the run: its steps have begun, and can go on later."""
    try:
        yield
    except ValueError as error:
        raise RunFailed(str(error)) from error


def supervised() -> bool:
    return PIPE in os.environ


def tell(**words: Any) -> None:
    """Sends one message, as JSON on a line; without a supervisor nobody is told."""
    if supervised():
        with suppress(OSError):  # the supervisor is gone; the closed standard input says so too
            os.write(int(os.environ[PIPE]), (json.dumps(words) + "\n").encode())


def job_cores() -> int:
    """Processor cores that this job may count on: its share where several run side by side, else all."""
    if CORES in os.environ:
        return int(os.environ[CORES])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def megabytes(num_bytes: int) -> str:
    """Bytes as 1,234.5 MB."""
    return f"{num_bytes / 1e6:,.1f} MB"


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 3:02:11."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
