from collections import Counter

import numpy as np
import pytest

from clipft.data.order import batch_at, permutation, rank_slice, rng_for, steps_per_epoch


def draws(*key: int) -> list[float]:
    return rng_for(*key).random(4).tolist()


def test_a_key_gives_the_same_stream_every_time_and_no_other_key_gives_it():
    keys = [(), (0,), (1,), (1, 0), (0, 1), (1, 0, 0), (10,), (1, 2**32), (2**32, 1), (1, 1), (11,)]
    assert draws(1, 0) == draws(1, 0) == draws(*np.array([1, 0]).tolist())
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)


def test_an_epoch_is_every_sample_once_but_for_the_remainder():
    for epoch in range(3):
        steps = range(epoch * 4, epoch * 4 + 4)
        seen = [batch_at(7, step, 43, 10) for step in steps]
        assert [number for number, _ in seen] == [epoch] * 4
        assert max(Counter(i for _, batch in seen for i in batch.tolist()).values()) == 1


def test_the_remainder_is_another_one_each_epoch():
    missing = [set(range(43)) - {i for s in range(4) for i in batch_at(7, 4 * e + s, 43, 10)[1]} for e in range(6)]
    assert all(len(left) == 3 for left in missing)
    assert len({frozenset(left) for left in missing}) > 1


def test_no_unit_is_left_out_where_batches_come_out_even():
    assert {i for step in range(4) for i in batch_at(7, step, 40, 10)[1].tolist()} == set(range(40))


def test_a_batch_does_not_depend_on_what_was_asked_before():
    forward = [batch_at(1, step, 50, 8)[1].tolist() for step in range(20)]
    backward = [batch_at(1, step, 50, 8)[1].tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]


def test_another_seed_or_epoch_is_another_order():
    orders = [permutation(seed, epoch, 100).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_changing_a_batch_does_not_change_the_order():
    batch_at(3, 0, 20, 5)[1][:] = 0
    assert len(set(batch_at(3, 0, 20, 5)[1].tolist())) == 5


def test_every_sample_comes_first_equally_often():
    firsts = Counter(int(permutation(0, epoch, 5)[0]) for epoch in range(2000))
    assert all(abs(count - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8) for count in firsts.values())


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_rank_slices_cover_the_batch_in_order_and_differ_by_at_most_one(world: int):
    parts = [list(range(11))[rank_slice(11, rank, world)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(11))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_larger_than_the_data_or_smaller_than_the_ranks_raises():
    assert steps_per_epoch(43, 10) == 4
    with pytest.raises(ValueError, match=r"train\.batch_size=9 is more than the 8"):
        batch_at(0, 0, 8, 9)
    with pytest.raises(ValueError, match=r"train\.batch_size=2 is less than the 3 devices"):
        rank_slice(2, 0, 3)
