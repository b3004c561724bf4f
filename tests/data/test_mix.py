from collections import Counter

import numpy as np
import pytest

from clipft.data.mix import BLOCK, Mix, shares

SIZES, WEIGHTS = (50, 7, 200), (2.0, 1.0, 1.0)


def mix(**changed) -> Mix:
    options = {"seed": 3, "sizes": SIZES, "weights": WEIGHTS, "batch_size": 16, "num_steps": 1000}
    return Mix(**(options | changed))


def source_of(unit: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), unit, side="right"))


def test_over_a_block_every_source_has_exactly_its_share():
    order = mix(batch_size=BLOCK // 100)
    seen = Counter(source_of(unit) for step in range(100) for unit in order.batch(step)[1].tolist())
    assert seen == {0: BLOCK // 2, 1: BLOCK // 4, 2: BLOCK // 4}


def test_a_source_gives_each_of_its_units_once_before_any_comes_again():
    order = mix()
    drawn: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for step in range(1000):  # over the end of a block
        for number, unit in zip(*(rows.tolist() for rows in order.batch(step)), strict=True):
            drawn[source_of(unit)].append((number, unit))
    for source, size in enumerate(SIZES):
        first = sum(SIZES[:source])
        for number in range(len(drawn[source]) // size):
            here = drawn[source][number * size : (number + 1) * size]
            assert sorted(here) == [(number, unit) for unit in range(first, first + size)]


def test_rounds_are_drawn_anew():
    order = mix()
    drawn = [unit for step in range(20) for unit in order.batch(step)[1].tolist() if 50 <= unit < 57]
    rounds = [tuple(drawn[i : i + 7]) for i in range(0, 56, 7)]
    assert len(set(rounds)) > 6


def test_a_batch_is_the_same_whatever_was_asked_before():
    order = mix()
    forward = [[rows.tolist() for rows in order.batch(step)] for step in range(700)]
    for step in (699, 3, 624, 625, 0, 626):
        assert [rows.tolist() for rows in order.batch(step)] == forward[step]
        assert [rows.tolist() for rows in mix().batch(step)] == forward[step]
    assert mix(seed=4).batch(0)[1].tolist() != forward[0][1]


def test_an_epoch_is_the_whole_run():
    assert mix().per_epoch == 1000


def test_shares_come_out_even_whatever_the_weights():
    assert shares((1.0, 1.0, 1.0)) == [3334, 3333, 3333] and shares((0.5,)) == [BLOCK]
    assert sum(shares((0.1, 0.27, 3.14, 15.0))) == BLOCK
    with pytest.raises(ValueError, match=r"data\.train: a weight of 1e-09 is less than 1 in 10000"):
        shares((1.0, 1e-9))
