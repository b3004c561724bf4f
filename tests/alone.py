"""Tests in a forked process of their own.

Fake tensors, with which torch.compile traces too, leave traces in a process without a GPU: what is forked from it later
has no backward pass any more, and other tests fork their ranks.
"""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection
from typing import Any

import pytest

TIMEOUT_S = 600


def alone(test: Callable[..., None]) -> Callable[..., None]:
    @wraps(test)
    def in_a_process(*arguments: Any, **named: Any) -> None:
        fork = multiprocessing.get_context("fork")
        mine, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_run, args=(theirs, test, arguments, named))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
            process.start()
        theirs.close()
        said = mine.recv() if mine.poll(TIMEOUT_S) else f"nothing was heard of it for {TIMEOUT_S} s"
        mine.close()
        process.kill() if said else process.join(TIMEOUT_S)
        if said:
            pytest.fail(said, pytrace=False)
        assert process.exitcode == 0

    return in_a_process


def _run(said: Connection, test: Callable[..., None], arguments: Any, named: Any) -> None:
    try:
        test(*arguments, **named)
    except BaseException:
        said.send(traceback.format_exc())
        raise
    said.send("")
