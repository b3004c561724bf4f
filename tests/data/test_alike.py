"""Images that look the same, against slow loops."""

import itertools

import numpy as np
import pytest

from clipft.data import alike
from clipft.data.alike import MOST_BITS, MOST_COLOUR, components, near_pairs, same_value


def looks(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and colours in clusters around few pictures, at all distances around the limits."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (num // 12, 128), np.uint8)[rng.integers(0, num // 12, num)]
    for row in bits:
        row[rng.choice(128, rng.integers(0, 9), replace=False)] ^= 1
    colours = rng.choice([20, 24, 200], (num, 1)) + rng.integers(0, 9, (num, 48))
    return np.packbits(bits, axis=1).view(np.uint64), colours.clip(0, 255).astype(np.uint8)


def slow_pairs(hashes: np.ndarray, colours: np.ndarray) -> set[tuple[int, int]]:
    found = set()
    for i, j in itertools.combinations(range(len(hashes)), 2):
        num_bits = sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(hashes[i], hashes[j], strict=True))
        differ = max(abs(int(a) - int(b)) for a, b in zip(colours[i], colours[j], strict=True))
        if num_bits <= MOST_BITS and differ <= MOST_COLOUR:
            found.add((i, j))
    return found


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_no_pair_that_looks_the_same_is_missed_and_no_other_found(monkeypatch, block: int):
    monkeypatch.setattr(alike, "BLOCK", block)
    hashes, colours = looks(120)
    expected = slow_pairs(hashes, colours)
    assert 20 < len(expected) < 500
    assert {(a, b) for a, b in near_pairs(hashes, colours).tolist()} == expected


def test_few_or_no_pictures_have_no_pairs():
    for num in (0, 1):
        hashes, colours = looks(12)
        assert near_pairs(hashes[:num], colours[:num]).shape == (0, 2)


def test_equal_values_are_connected_and_others_not():
    values = np.random.default_rng(0).integers(0, 30, 100).astype(np.uint64)
    label = components(len(values), same_value(values))
    for i, j in itertools.combinations(range(100), 2):
        assert (label[i] == label[j]) == (values[i] == values[j])


def test_what_is_connected_over_others_belongs_together():
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 200, (120, 2))
    pairs = np.concatenate([pairs, np.stack([np.arange(200, 299), np.arange(201, 300)], axis=1)[::-1]])  # a long chain
    label = components(300, pairs)
    expected = list(range(300))
    for _ in range(300):
        for a, b in pairs.tolist():
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert label.tolist() == expected
