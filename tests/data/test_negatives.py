"""Expected false negatives of a batch, against loops and against batches that are drawn."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from clipft.data.check.negatives import expected_in_batch, pairs_drawn_equal, pairs_within


def test_pairs_of_equal_values_are_those_of_a_loop():
    values = np.random.default_rng(0).integers(0, 9, 60)
    assert pairs_within(values) == sum(a == b for a, b in itertools.combinations(values.tolist(), 2))
    assert pairs_within(values[:0]) == 0
    huge = np.zeros(3, np.int64).repeat(10)
    assert pairs_within(huge) == 435


def test_the_expected_number_is_exact_over_all_batches():
    """Every batch of 4 out of 8 samples, each as likely as the others."""
    values = [0, 0, 0, 1, 1, 2, 3, 4]
    batches = list(itertools.combinations(values, 4))
    found = sum(a == b for batch in batches for a, b in itertools.combinations(batch, 2))
    expected = Fraction(found, len(batches))
    assert expected_in_batch(pairs_within(np.array(values)) * 1.0, 8, 4) == pytest.approx(float(expected), rel=1e-12)
    assert expected_in_batch(4.0, 8, 8) == pytest.approx(4.0) and expected_in_batch(0.0, 1, 64) == 0


def test_drawn_batches_have_as_many_pairs_on_average():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 40, 300)
    counts = []
    for _ in range(3000):
        batch = np.unique(rng.permutation(values)[:48], return_counts=True)[1]
        counts.append((batch * (batch - 1) // 2).sum())
    expected = expected_in_batch(float(pairs_within(values)), 300, 48)
    assert abs(np.mean(counts) - expected) < 5 * np.std(counts) / len(counts) ** 0.5
    assert expected > 10


def test_one_caption_drawn_of_each_image_makes_the_pairs_of_a_loop_and_of_drawing():
    rng = np.random.default_rng(2)
    captions = [rng.integers(0, 12, rng.integers(1, 6)).tolist() for _ in range(40)]
    owner = np.repeat(np.arange(40), [len(each) for each in captions])
    ids = np.array([caption for each in captions for caption in each], np.int64)
    loop = sum(
        sum(a == b for a in one for b in other) / (len(one) * len(other))
        for one, other in itertools.combinations(captions, 2)
    )
    assert pairs_drawn_equal(owner, ids) == pytest.approx(loop, rel=1e-12)
    draws = []
    for _ in range(2000):
        drawn = np.array([each[rng.integers(len(each))] for each in captions])
        draws.append(pairs_within(drawn))
    assert abs(np.mean(draws) - loop) < 5 * np.std(draws) / len(draws) ** 0.5


def test_with_one_caption_an_image_both_ways_to_count_agree():
    ids = np.random.default_rng(3).integers(0, 20, 100)
    assert pairs_drawn_equal(np.arange(100), ids) == pytest.approx(pairs_within(ids))
    assert pairs_drawn_equal(np.arange(0), ids[:0]) == 0
