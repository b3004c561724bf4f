import itertools
import math

import pytest

from clipft.learn.schedule import lr_at


def test_the_rate_rises_linearly_to_its_peak_and_falls_along_a_cosine():
    rates = [lr_at(step, 100, 2.0, 10, "cosine") for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_a_constant_rate_stays_after_the_warm_up():
    assert [lr_at(step, 8, 1.0, 2, "constant") for step in range(8)] == [0.5] + 7 * [1.0]


def test_without_warm_up_the_first_step_has_the_peak():
    assert lr_at(0, 5, 3.0, 0, "cosine") == 3.0
