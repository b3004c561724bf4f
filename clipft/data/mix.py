"""Several sources in fixed shares, each shuffled by itself: still a pure function of the step."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from clipft.data.order import shuffled

SLOT_STREAM, SOURCE_STREAM = 4, 5  # beside the streams of captions, augmentation and lanes
BLOCK = 10_000  # slots in which every source has exactly its share


@dataclass(frozen=True)
class Mix:
    """Slots are dealt to sources by weight; a source gives each of its units once before any comes again."""

    seed: int
    sizes: tuple[int, ...]
    """Units of each source, in the order of the units."""
    weights: tuple[float, ...]
    batch_size: int
    num_steps: int
    orders: dict[int, tuple[int, Int64[np.ndarray, " N"]]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """Source -> the round that its order is of, and that order: the last one asked for."""

    @property
    def per_epoch(self) -> int:
        """The whole run: sources of other lengths come to their ends at other times."""
        return self.num_steps

    @property
    def layout(self) -> str:
        return f"sources {self.sizes} weights {self.weights}"

    def batch(self, step: int) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Round (of its source) and unit of each row."""
        source, place = self.deal(np.arange(step * self.batch_size, (step + 1) * self.batch_size))
        rounds, units = np.zeros_like(place), np.zeros_like(place)
        for s, size in enumerate(self.sizes):
            rounds[source == s], within = np.divmod(place[source == s], size)
            units[source == s] = sum(self.sizes[:s]) + self.units_of(s, place[source == s] // size, within)
        return rounds, units

    def deal(self, slots: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The source of each slot, counted over the run, and how many slots that source has had before it."""
        quotas = shares(self.weights)
        source, place = np.zeros_like(slots), np.zeros_like(slots)
        for block in np.unique(slots // BLOCK).tolist():
            dealt = np.repeat(np.arange(len(quotas)), quotas)[shuffled(BLOCK, self.seed, SLOT_STREAM, block)]
            before = np.zeros(BLOCK, np.int64)
            for s, quota in enumerate(quotas):
                before[dealt == s] = block * quota + np.arange(quota)
            here = slots // BLOCK == block
            source[here], place[here] = dealt[slots[here] % BLOCK], before[slots[here] % BLOCK]
        return source, place

    def units_of(
        self, source: int, rounds: Int64[np.ndarray, " n"], within: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " n"]:
        """Number within the source of the units at these places of these rounds."""
        found = np.zeros_like(within)
        for number in np.unique(rounds).tolist():
            if self.orders.get(source, (-1,))[0] != number:
                self.orders[source] = number, shuffled(self.sizes[source], self.seed, SOURCE_STREAM, source, number)
            found[rounds == number] = self.orders[source][1][within[rounds == number]]
        return found


def shares(weights: tuple[float, ...]) -> list[int]:
    """Slots of each source in a block: by weight, the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]] += 1
    if not quotas.all():
        least = weights[int(np.argmin(quotas))]
        raise ValueError(
            f"data.train: a weight of {least} is less than 1 in {BLOCK} of all. Raise it, or leave it out."
        )
    return quotas.tolist()
