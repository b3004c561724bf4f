"""Shards that lie elsewhere, brought before they are read, in the order in which the steps of a run read them."""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Thread

from clipft.data.lanes import Lanes
from clipft.data.order import Order, rank_slice
from clipft.data.remote.cache import Remote, RemoteShard
from clipft.data.remote.fetch import NotFetched, nothing
from clipft.report import RunFailed

AHEAD_TRIES = 2  # the reader, who waits meanwhile, has more of its own
GRACE_S = 10.0  # since its last use, in which a shard is not taken away: other processes may be a step behind
PAUSE_S = 0.5  # before it looks again, where there is nothing to bring


@dataclass
class Ahead:
    """Brings in a thread what the next steps of this rank read. What it cannot bring, the reader will, or say why."""

    remote: Remote
    paths: list[str]
    """Of all shards of the order, by their number."""
    order: Order
    rank: int
    world: int
    step: int = -1
    grace_s: float = GRACE_S
    thread: Thread | None = field(default=None, repr=False)
    failed: set[str] = field(default_factory=set)

    def at(self, step: int) -> None:
        """Notes where the reader is; the thread begins with the first step."""
        self.step = step
        if self.thread is None:
            # A reader that hangs must not seem to get further because this thread does.
            cache = self.remote.cache
            cache = replace(cache, beat=nothing, patience=replace(cache.patience, tries=AHEAD_TRIES))
            self.remote = replace(self.remote, cache=cache)
            self.thread = Thread(target=self.run, daemon=True)
            self.thread.start()

    def run(self) -> None:
        while True:
            if not self.bring_next():
                time.sleep(PAUSE_S)

    def bring_next(self) -> bool:
        """Brings the first shard that is missing, where it takes no room from what is read before it."""
        cache, looked_s = self.remote.cache, time.time() - self.grace_s
        mine, soon = needed(self.order, self.step, len(self.paths), self.rank, self.world)
        cache.touch([*(shard for number in soon if (shard := self.shard(number))), *self.remote.kept])
        for number in mine:
            shard = self.shard(number)
            if shard is None or shard.path in self.failed or cache.has(shard):
                continue
            try:
                if cache.bring(shard, older_than=looked_s) is not None:
                    return True
            except (NotFetched, RunFailed, ValueError, OSError):
                self.failed.add(shard.path)
        return False

    def shard(self, number: int) -> RemoteShard | None:
        return self.remote.shards.get(self.paths[number])


def needed(order: Order, step: int, num_shards: int, rank: int, world: int) -> tuple[list[int], list[int]]:
    """Numbers of the shards that a rank reads from this step on, and of those that any rank does, the first first.

    Under lanes those of this window and the next; else all are read all the time.
    """
    if not isinstance(order, Lanes):
        numbers = list(range(num_shards))
        return numbers[rank * num_shards // world :] + numbers[: rank * num_shards // world], numbers
    rows = rank_slice(order.batch_size, rank, world)
    taken = order.batch_size // order.lanes
    own = slice(rows.start // taken, -(-rows.stop // taken))
    here = list(windows_from(order, step))
    return unique(lane for window in here for lane in window[own]), unique(lane for w in here for lane in w)


def windows_from(order: Lanes, step: int) -> Iterator[list[list[int]]]:
    """The window that a step reads and the one after it, which may be the next epoch's first."""
    epoch, number = order.window_of(step)
    windows = order.windows(epoch)
    yield windows[number]
    with suppress(IndexError):
        yield windows[number + 1]
        return
    yield order.windows(epoch + 1)[0]


def unique(groups: Iterable[list[int]]) -> list[int]:
    return list(dict.fromkeys(number for group in groups for number in group))


def most_at_once(order: Order, sizes: list[int], num_epochs: int) -> int:
    """Bytes of the shards that are read at the same time, with those that come next: all, or two windows of lanes."""
    if not isinstance(order, Lanes):
        return sum(sizes)
    windows = [window for epoch in range(num_epochs) for window in order.windows(epoch)]
    pairs = zip(windows, windows[1:] or windows, strict=False)
    return max(sum(sizes[number] for number in unique([*first, *second])) for first, second in pairs)
