"""An order that reads few shards at a time, for sets larger than memory and for disks that seek slowly."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from clipft.data.order import rng_for, shuffled

SHARD_STREAM, UNIT_STREAM = 2, 3  # beside the streams of captions and augmentation in the loader
COUNTED_STEPS = 200


@dataclass(frozen=True)
class Lanes:
    """Every unit once an epoch; each lane goes through shards of its own and shuffles within a window of them.

    An epoch's shards, in an order drawn anew, are laid end to end and cut into lanes of equal length; a batch takes
    as many units from each lane. Rows are sorted by lane, so that a rank serves whole lanes wherever the number of
    ranks divides theirs.
    """

    seed: int
    shard_sizes: tuple[int, ...]
    """Units of each shard, in the order of the units."""
    batch_size: int
    lanes: int
    window_shards: int
    """Shards, of the mean size, that a lane's window holds."""

    def __post_init__(self):
        if self.batch_size % self.lanes:
            raise ValueError(
                f"data.lanes={self.lanes} does not divide train.batch_size={self.batch_size}: a batch takes as many "
                "pairs from each lane."
            )
        if not self.per_epoch:
            raise ValueError(
                f"train.batch_size={self.batch_size} is more than the {sum(self.shard_sizes)} pairs of an epoch that "
                f"data.lanes={self.lanes} lanes have. Make it smaller or bring more data."
            )

    @property
    def per_epoch(self) -> int:
        return sum(self.shard_sizes) // self.lanes // (self.batch_size // self.lanes)

    @property
    def layout(self) -> str:
        return f"lanes {self.lanes} window {self.window_shards}"

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Epoch and unit of each row."""
        epoch, place = divmod(step, self.per_epoch)
        taken = self.batch_size // self.lanes
        order = lane_order(self.seed, epoch, self.shard_sizes, self.lanes, self.window)
        return np.full(self.batch_size, epoch), order[:, place * taken : (place + 1) * taken].reshape(-1)

    @property
    def window(self) -> int:
        """Units of a lane's window."""
        return max(1, round(self.window_shards * float(np.mean(self.shard_sizes))))

    def windows(self, epoch: int) -> list[list[list[int]]]:
        """The shards of each lane in each window of an epoch, from the order of the shards alone."""
        order = shard_order(self.seed, epoch, len(self.shard_sizes))
        ends = np.cumsum(np.array(self.shard_sizes)[order])
        length = sum(self.shard_sizes) // self.lanes
        found = []
        for start in range(0, length, self.window):
            firsts = np.arange(self.lanes) * length + start
            lasts = np.arange(self.lanes) * length + min(start + self.window, length) - 1
            spans = zip(np.searchsorted(ends, firsts, "right"), np.searchsorted(ends, lasts, "right"), strict=True)
            found.append([order[first : last + 1].tolist() for first, last in spans])
        return found

    def window_of(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and the number of the window that its first units lie in."""
        epoch, place = divmod(step, self.per_epoch)
        return epoch, place * (self.batch_size // self.lanes) // self.window

    def same_shard_pairs(self) -> float:
        """Mean number of pairs of one shard in a batch, over up to COUNTED_STEPS steps of the first epoch."""
        shard_of = np.repeat(np.arange(len(self.shard_sizes)), self.shard_sizes)
        steps = np.unique(np.linspace(0, self.per_epoch - 1, COUNTED_STEPS).astype(int)).tolist()
        counts = [np.bincount(shard_of[self.batch(step)[1]]) for step in steps]
        return float(np.mean([(count * (count - 1) / 2).sum() for count in counts]))

    def shuffled_same_shard_pairs(self) -> float:
        """The number to be expected where all units are shuffled together."""
        sizes, total = np.array(self.shard_sizes), sum(self.shard_sizes)
        share = (sizes * (sizes - 1)).sum() / max(1, total * (total - 1))
        return float(self.batch_size * (self.batch_size - 1) / 2 * share)


@lru_cache(maxsize=1)
def lane_order(
    seed: int, epoch: int, shard_sizes: tuple[int, ...], lanes: int, window: int
) -> Int64[np.ndarray, "lanes N"]:
    """The units of each lane, shuffled within windows of so many; what does not come out even is left out."""
    ends = np.cumsum(shard_sizes).tolist()
    shards = shard_order(seed, epoch, len(shard_sizes))
    laid = np.concatenate([np.arange(ends[shard] - shard_sizes[shard], ends[shard]) for shard in shards.tolist()])
    length = len(laid) // lanes
    rows = laid[: length * lanes].reshape(lanes, length)
    number = np.arange(length) // window
    bits = rng_for(seed, epoch, UNIT_STREAM).bit_generator.random_raw(rows.size).reshape(rows.shape)
    order = np.take_along_axis(rows, np.lexsort((bits, np.broadcast_to(number, rows.shape)), axis=1), axis=1)
    order = order.astype(np.int64)
    order.setflags(write=False)
    return order


def shard_order(seed: int, epoch: int, num_shards: int) -> Int64[np.ndarray, " shards"]:
    """The order in which an epoch's shards are laid end to end."""
    return shuffled(num_shards, seed, epoch, SHARD_STREAM)
