"""Gloo ranks for tests: forked, so that what the test has imported is not imported again."""

import multiprocessing
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60


def on_ranks(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(*arguments) on each rank of a process group; what each returned (tensors and plain values)."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_run, args=(r, world, folder, function, arguments)) for r in range(world)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive and [process.exitcode for process in ranks] == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def _run(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    torch.save(function(*arguments), folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()
