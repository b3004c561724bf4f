"""bench step: what a step of a run takes longer than one of a bare loop, where they take turns."""

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import IterableDataset

from clipft.bench.report import Row, spread
from clipft.bench.stepping import Resident, plain_step, plain_step_with_our_encoders, train
from clipft.data.loader import Batch

STILL = 1e-9  # a rate that leaves the weights where they are, so that every step has the same work
WARM_UP = 3  # turns that are not counted
OURS = "ours"


def overhead(resident: Resident, steps: int, rounds: int) -> list[Row]:
    """Milliseconds of a step of ours beyond one of each bare loop, by the medians of so many steps of a run.

    Ours is the whole turn of Lightning's loop: fetching the batch, the step, and what follows it.
    """
    model = f"{resident.clip.name}, batch {resident.size}"
    same_maths = plain_step_with_our_encoders(resident, STILL)
    bare = {"plain loop": plain_step(resident, STILL), "our encoders": same_maths, "again": same_maths}
    middles = []
    for number in range(rounds):
        seconds = in_turns(resident, steps, bare, random.Random(number))
        middles.append({name: 1000 * median(each) for name, each in seconds.items()})

    def row(what: str, one: str, other: str) -> Row:
        beyond = spread([each[one] - each[other] for each in middles])
        return {"what": f"{model}: {what}", "ms a step": median([each[one] for each in middles]), "ms beyond": beyond}

    return [
        row("ours beyond plain loop", OURS, "plain loop"),
        row("ours beyond plain loop, our encoders", OURS, "our encoders"),
        row("that loop beyond itself", "again", "our encoders"),
    ]


def in_turns(
    resident: Resident, steps: int, bare: Mapping[str, Callable[[], None]], draw: random.Random
) -> dict[str, list[float]]:
    """Seconds of steps of ours and of each loop, one of each in a turn, in an order that is drawn for it."""
    turns = Turns(resident, steps, bare, draw)
    gc.collect()
    gc.freeze()  # as a run does
    try:
        with tempfile.TemporaryDirectory(prefix="clipft-bench-") as folder:
            train(resident, Path(folder), WARM_UP + steps, lr=STILL, batches=turns)
    finally:
        gc.unfreeze()
    return {name: each[WARM_UP : WARM_UP + steps] for name, each in turns.seconds.items()}


class Turns(IterableDataset[Batch]):
    """Gives the batch again and again; a step of ours lasts until the next batch is asked for."""

    def __init__(self, resident: Resident, steps: int, bare: Mapping[str, Callable[[], None]], draw: random.Random):
        self.resident, self.steps, self.bare, self.draw = resident, steps, bare, draw
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *bare)}

    def __iter__(self) -> Iterator[Batch]:
        names = list(self.seconds)
        for _ in range(WARM_UP + self.steps + 1):  # one is asked for ahead
            self.draw.shuffle(names)
            for name in names:
                start = self._now()
                if name == OURS:
                    yield self.resident.batch
                else:
                    self.bare[name]()
                self.seconds[name].append(self._now() - start)

    def _now(self) -> float:
        if self.resident.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
