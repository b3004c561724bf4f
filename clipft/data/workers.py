"""One function over many items, by several processes."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import TypeVar

from clipft.data.progress import Progress
from clipft.report import RunFailed, job_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_workers(asked: int | None) -> int:
    """How many processes an option asks for; null means one per core that this job may count on."""
    return job_cores() if asked is None else asked


def map_items(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: Progress,
    key: str,
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """The function's result for each item, in their order; up to one worker it is called in this process.

    `key` names the option that sets the number of workers, `sizes` what each item counts in the progress (1).
    """
    sizes = [1] * len(items) if sizes is None else sizes
    workers = min(workers, len(items))
    try:
        if workers <= 1:
            return [told(progress, function(item), size) for item, size in zip(items, sizes, strict=True)]
        return pooled(function, items, workers, progress, key, sizes)
    finally:
        progress.end()


def told(progress: Progress, result: Result, size: int) -> Result:
    progress.add(size)
    return result


def pooled(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: Progress,
    key: str,
    sizes: Sequence[int],
) -> list[Result]:
    # Not by fork: it is not safe in a process with threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        futures = {pool.submit(function, item): size for item, size in zip(items, sizes, strict=True)}
        for future in finished(futures, progress):
            future.result()
            progress.add(futures[future])
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise RunFailed(
            f"a process that did the reading died; memory may have run out. Use fewer of them: {key}=1"
        ) from error
    finally:
        # Not by `with pool`, which would do all the rest first.
        pool.shutdown(cancel_futures=True)


def finished(futures: dict[Future[Result], int], progress: Progress) -> Iterator[Future[Result]]:
    """The futures as they get done; progress is also told while none does."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=min(1.0, progress.period), return_when=FIRST_COMPLETED)
        progress.tell()
        yield from done


def start_worker() -> None:
    """Lets a worker end without a word on Ctrl-C, and when the command that started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
