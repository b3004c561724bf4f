"""bench scale: what a step sends between ranks, counted beside what the formulas say."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.multiprocessing.spawn import start_processes
from torch.profiler import ProfilerActivity, profile

from clipft.bench.report import Row
from clipft.bench.stepping import Resident, place, train
from clipft.config import TrainerConfig
from clipft.launch import free_port, rank_variables
from clipft.learn.stop import STOPS
from clipft.ranks import joined
from clipft.run import quiet_libraries

MODEL = "tiny"
WATCHED = 3  # the step that is counted: DDP makes its buckets anew after the first one
SIZES = {"float": 4, "c10::BFloat16": 2, "long int": 8}  # bytes, by the profiler's names
GATHER, REDUCE = "all-gather", "all-reduce"
KINDS = {"gloo:all_gather": GATHER, "gloo:all_reduce": REDUCE}
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes of gradients that DDP sends together
FIXED_SUMS = 4 + 2  # loss, shared, skipped, used; save and evaluate


@dataclass(frozen=True)
class Sent:
    """A collective of one rank."""

    kind: str
    bytes: int
    """That the rank hands in."""


class Watcher(pl.Callback):
    """Profiles one step, from its start to that of the next one."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = batch_idx + 1
        if step == WATCHED:
            self.profile.__enter__()
        elif step == WATCHED + 1:
            self.profile.__exit__(None, None, None)


def bench_scale(worlds: list[int], batch_size: int) -> list[Row]:
    """Rows of collectives and bytes of one step, for each number of ranks and both kinds of features."""
    rows = []
    for world in worlds:
        for dtype in (None, torch.bfloat16):
            sent, model = counted(world, batch_size, dtype)
            expected = predicted(world, batch_size, dtype, **model)
            rows += [row(world, dtype, kind, sent, expected) for kind in (GATHER, REDUCE)]
    return rows


def row(world: int, dtype: torch.dtype | None, kind: str, sent: list[Sent], expected: list[Sent]) -> Row:
    counts: Row = {"ranks": world, "features": "bf16" if dtype else "fp32", "collective": kind}
    for name, each in (("counted", sent), ("predicted", expected)):
        mine = [one.bytes for one in each if one.kind == kind]
        counts |= {name: len(mine), f"{name} bytes": sum(mine)}
    return counts


def predicted(world: int, batch_size: int, dtype: torch.dtype | None, *, width: int, trained: int) -> list[Sent]:
    """What a rank of W hands in at a step of B pairs, b = B / W its own; features of width D, P trained parameters."""
    if world == 1:
        return []
    b, size = -(-batch_size // world), 2 if dtype else 4
    gathers = [b * (2 * width + 1) * size, b * 8, b * 2 * 4]  # features and validity, ids, log-sum-exps
    gradients = 4 * trained
    buckets = 1 + max(0, -(-(gradients - FIRST_BUCKET) // BUCKET))
    sums = 4 * (FIXED_SUMS + len(STOPS) + 1 + 3 * world)
    reduces = [gradients, *[0] * (buckets - 1), sums]  # how the gradients are shared out does not matter
    return [*(Sent(GATHER, each) for each in gathers), *(Sent(REDUCE, each) for each in reduces)]


def counted(world: int, batch_size: int, dtype: torch.dtype | None) -> tuple[list[Sent], dict[str, int]]:
    """What the first of so many gloo ranks sent in a step of training, and the sizes of the model."""
    resident = place(MODEL, batch_size // world, torch.device("cpu"), "32-true")
    with tempfile.TemporaryDirectory(prefix="clipft-bench-") as folder:
        start_ranks(world, lambda rank, port: step_on_rank(resident, Path(folder), rank, world, port, dtype))
        sent = [Sent(kind, size) for kind, size in json.loads((Path(folder) / "sent.json").read_text())]
    trained = sum(each.numel() for each in resident.clip.model.parameters() if each.requires_grad)
    return sent, {"width": resident.clip.model_cfg["embed_dim"], "trained": trained}


def start_ranks(world: int, work: Callable[[int, int], None]) -> None:
    """work(rank, port) in so many processes, forked so that nothing is imported again; raises what one of them does."""
    port = free_port()
    start_processes(work, (port,), nprocs=world, start_method="fork")


def step_on_rank(resident: Resident, folder: Path, rank: int, world: int, port: int, dtype: torch.dtype | None) -> None:
    os.environ |= {**rank_variables(rank, world, port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    quiet_libraries()
    watcher = Watcher()
    with joined(TrainerConfig(accelerator="cpu", precision="32-true")) as ranks, open(os.devnull, "w") as nowhere:
        (folder / str(rank)).mkdir()
        os.dup2(nowhere.fileno(), 2)  # lines of progress
        mine = replace(resident, ranks=ranks)
        # Two micro-batches: they add no collective.
        micro = max(1, mine.size // 2)
        train(mine, folder / str(rank), WATCHED + 1, micro_batch=micro, gather_dtype=dtype, watching=[watcher])
    if rank == 0:
        (folder / "sent.json").write_text(json.dumps(sent_in(watcher.profile)))


def sent_in(profiled: profile) -> list[tuple[str, int]]:
    """Kind and bytes of each collective; gloo's own events, since DDP starts its buckets from C++."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events: list[Any] = profiled.profiler.kineto_results.events()
    found = [event for event in events if event.name().startswith("gloo:")]
    return [(KINDS[each.name()], numel(each.shapes()[0]) * SIZES[each.dtypes()[0]]) for each in found]


def numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
