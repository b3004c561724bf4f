"""What a rank tells its supervisor over a pipe: how far it is, and why it ends. Nothing heavy is imported here."""

import json
import os
from contextlib import suppress
from typing import Any

PIPE = "CLIPFT_REPORT_FD"


class RunFailed(RuntimeError):
    """The run cannot go on, though its settings and data are in order; the message says what to do."""


def supervised() -> bool:
    return PIPE in os.environ


def tell(**words: Any) -> None:
    """Sends one message, as JSON on a line; without a supervisor nobody is told."""
    if supervised():
        with suppress(OSError):  # the supervisor is gone; the closed standard input says so too
            os.write(int(os.environ[PIPE]), (json.dumps(words) + "\n").encode())
