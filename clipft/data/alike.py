"""Which images are the same, by their bytes or by their looks, and what belongs together because of it. Pure numpy."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

MOST_BITS, MOST_COLOUR = 7, 10
"""Two pictures look the same when at most 7 of the 128 bits of their hash and no mean colour by more than 10 of 255
differ. JPEG at quality 50, half or twice the size and a squashed shape keep 95 of 100 photos of Flickr8k within that;
of its 33 million pairs one lies there, the same photo."""
BANDS = MOST_BITS + 1  # of 16 bits: where 7 bits differ, one of 8 bands does not
ROWS = 1 << 18  # hashes taken apart into bits at a time: 64 MB
BLOCK = 1 << 22  # pairs compared at a time: 100 MB
# Bands are made of bits from all over the hash, or pictures with a white border would all share some of them. Which
# bits they are decides how many pairs are compared, not which ones are found.
SCATTERED = np.random.default_rng(0).permutation(128)

Pairs = Int64[np.ndarray, "pairs 2"]


def same_value(values: UInt64[np.ndarray, " n"] | Int64[np.ndarray, " n"]) -> Pairs:
    """Neighbouring positions of each run of equal values, which connect all of them."""
    order = np.argsort(values, kind="stable")
    equal = values[order][1:] == values[order][:-1]
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1).astype(np.int64)


def near_images(looks: np.ndarray, usable: Bool[np.ndarray, " rows"]) -> Pairs:
    """Pairs of rows that look the same; of rows with the same bytes only the first is compared."""
    found = np.flatnonzero(usable & looks["hashed"])
    _, first = np.unique(looks["digest"][found], return_index=True)
    found = found[np.sort(first)]
    if not len(found):
        return np.zeros((0, 2), np.int64)
    return found[near_pairs(looks["hash"][found], looks["colours"][found])]


def near_pairs(hashes: UInt64[np.ndarray, "n 2"], colours: UInt8[np.ndarray, "n 48"]) -> Pairs:
    """All pairs of positions that look the same, the lower one first.

    Compared are those that share a band and have about the same mean colour: the time grows with their number.
    """
    bands = np.concatenate([bands_of(part) for part in np.array_split(hashes, 1 + len(hashes) // ROWS)])
    # Where no colour differs by more than 10, neither does their mean, which is cut to a whole number.
    mean = colours.sum(axis=1, dtype=np.int64) // colours.shape[1]
    found = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        keys = bands[:, band] * 512 + mean
        order = np.argsort(keys, kind="stable")
        ends = np.searchsorted(keys[order], keys[order] + MOST_COLOUR + 1, side="right")
        for left, right in blocks(ends):
            pairs = np.stack([order[left], order[right]], axis=1)
            found.append(pairs[look_same(hashes, colours, pairs)])
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


def bands_of(hashes: UInt64[np.ndarray, "n 2"]) -> Int64[np.ndarray, "n bands"]:
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), 16), axis=1)[:, SCATTERED]
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint16).astype(np.int64)


def blocks(ends: Int64[np.ndarray, " n"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions i and j of all pairs with i < j < ends[i], some millions at a time."""
    counts = ends - np.arange(len(ends)) - 1
    totals = np.cumsum(counts)
    start = 0
    while start < len(ends):
        before = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, before + BLOCK)))
        left = np.repeat(np.arange(start, stop), counts[start:stop])
        firsts = np.repeat(totals[start:stop] - counts[start:stop] - before, counts[start:stop])
        yield left, left + 1 + np.arange(len(left)) - firsts
        start = stop


def look_same(hashes: np.ndarray, colours: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Whether the two of each pair are near enough."""
    left, right = pairs[:, 0], pairs[:, 1]
    near = np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1) <= MOST_BITS
    some = np.flatnonzero(near)
    differ = np.abs(colours[left[some]].astype(np.int16) - colours[right[some]]).max(axis=1, initial=0)
    near[some] = differ <= MOST_COLOUR
    return near


def components(number: int, pairs: Pairs) -> Int64[np.ndarray, " n"]:
    """For each of so many things the lowest one that it is connected with."""
    label = np.arange(number)
    while True:
        low = np.minimum(label[pairs[:, 0]], label[pairs[:, 1]])
        new = label.copy()
        np.minimum.at(new, label[pairs[:, 0]], low)
        np.minimum.at(new, label[pairs[:, 1]], low)
        while not np.array_equal(new, new[new]):
            new = new[new]
        if np.array_equal(new, label):
            return label
        label = new
