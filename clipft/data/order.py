"""The order of an epoch's units as pure functions of seed, epoch and step: there is no state to save.

A unit is a sample, or one of the pairs of image and caption where each pair counts (clipft.data.pairs).
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64


def rng_for(*key: int) -> np.random.Generator:
    """Independent random stream of this key.

    The key is hashed because SeedSequence pads with zeros: it gives (1,) and (1, 0) the same stream.
    """
    digest = blake2b(",".join(str(int(part)) for part in key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def shuffled(number: int, *key: int) -> Int64[np.ndarray, " N"]:
    """0 to number - 1 in the order that is drawn for this key.

    Sorted raw bits: numpy promises that those stay the same in later versions, and not that
    Generator.permutation does (NEP 19).
    """
    return np.argsort(rng_for(*key).bit_generator.random_raw(number), kind="stable").astype(np.int64)


@lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, num_units: int) -> Int64[np.ndarray, " N"]:
    """The order of all units in this epoch."""
    order = shuffled(num_units, seed, epoch)
    order.setflags(write=False)
    return order


def steps_per_epoch(num_units: int, batch_size: int) -> int:
    """Whole global batches in an epoch; the remainder is another one each epoch and left out."""
    if not 0 < batch_size <= num_units:
        raise ValueError(
            f"train.batch_size={batch_size} is more than the {num_units} pairs of an epoch. "
            "Make it smaller or bring more data."
        )
    return num_units // batch_size


def batch_at(seed: int, step: int, num_units: int, batch_size: int) -> tuple[int, Int64[np.ndarray, " B"]]:
    """Epoch and units of global step `step`, counted from 0 over the whole run."""
    epoch, place = divmod(step, steps_per_epoch(num_units, batch_size))
    order = permutation(seed, epoch, num_units)
    return epoch, order[place * batch_size : (place + 1) * batch_size].copy()


@runtime_checkable
class Order(Protocol):
    """Which units a global step holds, a pure function of the step."""

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        ...

    @property
    def layout(self) -> str:
        """What besides seed, units and batch size decides the order; empty for a full shuffle."""
        ...

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Epoch and unit of each row of global step `step`, counted from 0 over the whole run."""
        ...


@dataclass(frozen=True)
class Shuffle:
    """Every unit once an epoch, in an order drawn anew over all of them."""

    seed: int
    num_units: int
    batch_size: int
    layout = ""

    def __post_init__(self):
        steps_per_epoch(self.num_units, self.batch_size)  # raises for a batch that they cannot fill

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.num_units, self.batch_size)

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        epoch, units = batch_at(self.seed, step, self.num_units, self.batch_size)
        return np.full(self.batch_size, epoch), units


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """This rank's part of a global batch; sizes differ by at most one."""
    if world > batch_size:
        raise ValueError(
            f"train.batch_size={batch_size} is less than the {world} devices: some would have no sample. "
            "Use a larger batch or fewer trainer.devices."
        )
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def num_rows(batch_size: int, rank: int, world: int) -> int:
    """Rows of this rank's slice."""
    rows = rank_slice(batch_size, rank, world)
    return rows.stop - rows.start


def largest_share(batch_size: int, world: int) -> int:
    """Rows of the largest of these slices."""
    return -(-batch_size // world)
