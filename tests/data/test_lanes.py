from collections import Counter

import numpy as np
import pytest

from clipft.data.lanes import Lanes
from clipft.data.order import rank_slice

SIZES = (30, 10, 25, 40, 7, 33, 20, 35)  # 200 units


def lanes(**changed) -> Lanes:
    options = {"seed": 3, "shard_sizes": SIZES, "batch_size": 16, "lanes": 4, "window_shards": 1}
    return Lanes(**(options | changed))


def shard_of(unit: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), unit, side="right"))


def test_an_epoch_has_every_unit_at_most_once_and_leaves_less_than_a_batch_and_a_lane():
    order = lanes()
    assert order.per_epoch == 12
    for epoch in range(3):
        batches = [order.batch(step) for step in range(epoch * 12, epoch * 12 + 12)]
        assert all(epochs.tolist() == [epoch] * 16 for epochs, _ in batches)
        seen = Counter(unit for _, units in batches for unit in units.tolist())
        assert max(seen.values()) == 1 and len(seen) == 192 and set(seen) <= set(range(200))


def test_what_is_left_out_is_something_else_each_epoch():
    order = lanes()
    left = [set(range(200)) - {u for s in range(12) for u in order.batch(12 * e + s)[1].tolist()} for e in range(4)]
    assert all(len(each) == 8 for each in left) and len({frozenset(each) for each in left}) == 4


def test_a_batch_is_the_same_whatever_was_asked_before_and_differs_between_seeds_and_epochs():
    order = lanes()
    forward = [order.batch(step)[1].tolist() for step in range(24)]
    assert [lanes().batch(step)[1].tolist() for step in reversed(range(24))] == forward[::-1]
    assert forward[:12] != forward[12:] and forward[0] != lanes(seed=4).batch(0)[1].tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_reads_shards_of_its_own_but_for_those_that_a_cut_goes_through(world):
    order = lanes()
    readers: dict[int, set[int]] = {}
    for step in range(12):
        _, units = order.batch(step)
        for rank in range(world):
            for unit in units[rank_slice(16, rank, world)].tolist():
                readers.setdefault(shard_of(unit), set()).add(rank)
    assert sum(len(ranks) - 1 for ranks in readers.values()) <= world - 1


def test_a_lane_has_few_shards_open_at_a_time():
    """Windows of one mean shard, 25 units, lie in at most four of these uneven shards; all units lie in eight."""
    order = lanes()
    for step in range(12):
        _, units = order.batch(step)
        assert max(len({shard_of(u) for u in lane}) for lane in units.reshape(4, 4).tolist()) <= 4


def test_expected_pairs_of_one_shard_are_those_that_are_met():
    order = Lanes(seed=0, shard_sizes=(50,) * 16, batch_size=40, lanes=2, window_shards=4)
    met = [pairs_of_one_shard(order.batch(step)[1] // 50) for step in range(20 * 40)]
    assert order.same_shard_pairs() == pytest.approx(np.mean(met), rel=0.1)
    whole = np.random.default_rng(0)
    met = [pairs_of_one_shard(whole.permutation(800)[:40] // 50) for _ in range(1000)]
    assert order.shuffled_same_shard_pairs() == pytest.approx(np.mean(met), rel=0.1)
    assert order.same_shard_pairs() > 1.5 * order.shuffled_same_shard_pairs()


def test_pairs_of_one_shard_in_several_lanes_count_too():
    order = Lanes(seed=0, shard_sizes=(400, 400), batch_size=80, lanes=8, window_shards=1)
    assert order.same_shard_pairs() == 2 * (40 * 39 / 2), "four lanes lie in each shard"
    assert order.shuffled_same_shard_pairs() == pytest.approx(80 * 79 / 2 * (399 / 799))


def pairs_of_one_shard(shards: np.ndarray) -> int:
    return sum(count * (count - 1) // 2 for count in Counter(shards.tolist()).values())


def test_lanes_that_a_batch_or_the_data_cannot_fill_are_refused():
    with pytest.raises(ValueError, match=r"data\.lanes=3 does not divide train\.batch_size=16"):
        lanes(lanes=3)
    with pytest.raises(ValueError, match=r"train\.batch_size=256 is more than the 200 pairs"):
        lanes(batch_size=256)
