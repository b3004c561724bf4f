"""Rows -> all numbers that the report shows. Pure functions of the rows."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from clipft.data.alike import components
from clipft.data.check.items import Tar
from clipft.data.check.negatives import expected_in_batch, pairs_drawn_equal, pairs_within
from clipft.data.check.rows import Rows, flags_of, is_cut, leaks
from clipft.data.draw import Shared

EXAMPLES = 3  # keys named per reason
PICTURES = 8  # shown per finding
TOP = 10  # most repeated captions that are shown
BINS = 12


@dataclass(frozen=True)
class SplitFigures:
    tars: int
    indexed: int
    usable: int
    captions: int
    labelled: int
    num_bytes: int
    """Of the images that can be used."""
    equal_captions: int
    """Captions that an earlier one of the split is equal to."""
    duplicates: int
    """Images with the bytes of an earlier one of the split."""
    near: int
    """Images that look like an earlier one of the split and have other bytes."""


@dataclass(frozen=True)
class Lengths:
    """Captions in tokens."""

    number: int
    cut: int
    median: int
    most: int
    ninety_nine: int
    """The number of tokens that 99 of 100 captions keep within."""
    bars: list[tuple[int, int, int]]
    """From, to and how many."""


@dataclass(frozen=True)
class FalseNegatives:
    """Pairs of a batch of the trained split that belong together."""

    number: int
    """Units that a batch is drawn from: images, or pairs under data.captions=all."""
    batch_sizes: list[int]
    pairs: dict[str, float]
    """Kind -> pairs in the whole split."""

    def expected(self, kind: str, batch_size: int) -> float:
        return expected_in_batch(self.pairs[kind], self.number, batch_size)


@dataclass(frozen=True)
class Script:
    captions: int
    median_tokens: int
    cut: int


@dataclass(frozen=True)
class Figures:
    splits: dict[str, SplitFigures]
    tars: list[tuple[Tar, int]]
    """Each with the number of its usable samples."""
    trained: str
    """The split that the numbers about training are of."""
    dropped: dict[str, list[int]]
    """Reason -> rows."""
    lengths: Lengths | None
    scripts: dict[str, Script]
    repeated: list[tuple[str, int]]
    """Captions that come most often in the trained split."""
    negatives: FalseNegatives
    shared: dict[str, Shared]
    leaked: dict[str, list[tuple[int, int]]]
    """By "train/val" and the like: rows of the second and of the first with the same image, or look."""
    groups: list[list[int]]
    """Rows of the trained split that look the same or are; the largest first."""
    flags: dict[str, Bool[np.ndarray, " rows"]]
    sides: list[tuple[int, int, int]]
    """Shorter side of the images in pixels: from, to and how many."""
    median_side: int
    smaller: int
    """Images whose shorter side has fewer pixels than the model's."""
    modes: dict[str, int]
    formats: dict[str, int]


def figures_of(
    rows: Rows, tars: list[Tar], image_size: int, context_length: int, captions: str, batch_sizes: list[int]
) -> Figures:
    """The numbers; `captions` is data.captions, on which it depends what a batch is drawn from."""
    trained = "train" if "train" in rows.splits or not rows.splits else rows.splits[0]
    flags = flags_of(rows, image_size, context_length)
    shared, leaked = shared_by(rows)
    looks = rows.seen.looks[rows.usable]
    sides = np.minimum(looks["height"], looks["width"])
    per_tar = Counter(item.shard for item, ok in zip(rows.items, rows.usable, strict=True) if ok)
    times = Counter(tar.path for tar in tars)  # that a shard is read for: one of two splits counts for both
    return Figures(
        splits={split: split_figures(rows, split, tars) for split in rows.splits},
        tars=[(tar, per_tar[tar.path] // times[tar.path]) for tar in tars],
        trained=trained,
        dropped=by_reason(rows),
        lengths=lengths_of(rows, context_length),
        scripts=scripts_of(rows, context_length),
        repeated=most_repeated(rows, trained),
        negatives=false_negatives(rows, trained, captions, batch_sizes),
        shared=shared,
        leaked=leaked,
        groups=groups_in(rows, trained),
        flags=flags,
        sides=bars_of(sides),
        median_side=int(np.median(sides)) if len(sides) else 0,
        smaller=int((sides < image_size).sum()),
        modes=dict(Counter(looks["mode"].tolist()).most_common()),
        formats=dict(Counter(looks["format"].tolist()).most_common()),
    )


def split_figures(rows: Rows, split: str, tars: list[Tar]) -> SplitFigures:
    here = rows.of(split)
    usable = here & rows.usable
    good, captions = np.flatnonzero(usable), usable[rows.owner]
    distinct = len(np.unique(rows.same[good]))
    return SplitFigures(
        tars=sum(tar.split == split for tar in tars),
        indexed=int(here.sum()),
        usable=len(good),
        captions=int(captions.sum()),
        labelled=int((np.array(rows.seen.labels)[good] >= 0).sum()),
        num_bytes=int(rows.seen.looks["bytes"][good].sum()),
        equal_captions=int(captions.sum()) - len(np.unique(rows.caption[captions])),
        duplicates=len(good) - distinct,
        near=distinct - len(np.unique(looks_within(rows, split)[good])),
    )


def looks_within(rows: Rows, split: str) -> np.ndarray:
    """For each row a group of equal and similar pictures, connected by pictures of this split alone."""
    present = np.zeros(len(rows.items), bool)
    present[rows.same[rows.of(split) & rows.usable]] = True
    near = rows.near[present[rows.near].all(axis=1)]
    firsts = np.stack([np.arange(len(rows.items)), rows.same], axis=1)
    return components(len(rows.items), np.concatenate([firsts, near]))


def by_reason(rows: Rows) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, reason in enumerate(rows.seen.reasons):
        if reason:
            found.setdefault(reason, []).append(i)
    return dict(sorted(found.items(), key=lambda each: -len(each[1])))


def lengths_of(rows: Rows, context_length: int) -> Lengths | None:
    if not len(rows.tokens):
        return None
    return Lengths(
        number=len(rows.tokens),
        cut=int(is_cut(rows, context_length).sum()),
        median=int(np.median(rows.tokens)),
        most=int(rows.tokens.max()),
        ninety_nine=int(np.percentile(rows.tokens, 99, method="higher")),
        bars=bars_of(rows.tokens),
    )


def bars_of(values: np.ndarray) -> list[tuple[int, int, int]]:
    """About a dozen ranges of equal width over whole numbers, both ends included, and how many lie in each.

    The last one holds all above the 99.5th percentile, so that few large values do not hide the rest.
    """
    if not len(values):
        return []
    low, high = int(values.min()), int(np.percentile(values, 99.5, method="higher"))
    width = max(1, -(-(high - low + 1) // BINS))
    starts = list(range(low, high + 1, width))
    ends = [*(start - 1 for start in starts[1:]), int(values.max())]
    return [(a, b, int(((values >= a) & (values <= b)).sum())) for a, b in zip(starts, ends, strict=True)]


def scripts_of(rows: Rows, context_length: int) -> dict[str, Script]:
    """Captions by the script of most of their letters, the most frequent first."""
    names, cut = np.array(rows.script, dtype=object), is_cut(rows, context_length)
    found = {}
    for name, number in Counter(rows.script).most_common():
        here = names == name
        found[name] = Script(number, int(np.median(rows.tokens[here])), int(cut[here].sum()))
    return found


def most_repeated(rows: Rows, split: str) -> list[tuple[str, int]]:
    texts = [caption for captions in rows.seen.captions for caption in captions]
    here = np.flatnonzero(in_split(rows, split)[rows.owner])
    ids, first, number = np.unique(rows.caption[here], return_index=True, return_counts=True)
    order = np.lexsort((ids, -number))[:TOP]
    return [(texts[here[first[n]]], int(number[n])) for n in order if number[n] > 1]


def in_split(rows: Rows, split: str) -> Bool[np.ndarray, " rows"]:
    return rows.of(split) & rows.usable if split in rows.splits else np.zeros(len(rows.items), bool)


def false_negatives(rows: Rows, split: str, captions: str, batch_sizes: list[int]) -> FalseNegatives:
    """Pairs of the split that belong together; images without captions are in no batch."""
    mine = in_split(rows, split)[rows.owner]
    owner = rows.owner[mine]
    units = owner if captions == "all" else np.unique(owner)
    looks = looks_within(rows, split) if split in rows.splits else rows.alike
    pairs: dict[str, float] = {}
    for kind, ids in (("equal caption", rows.caption[mine]), ("equal but for punctuation", rows.loose[mine])):
        pairs[kind] = float(pairs_within(ids)) if captions == "all" else pairs_drawn_equal(renumbered(owner), ids)
    pairs["same image"] = float(pairs_within(rows.same[units]))
    pairs["same or similar image"] = float(pairs_within(looks[units]))
    labels = np.array(rows.seen.labels, np.int64)[units]
    if (labels >= 0).any():
        pairs["same class"] = float(pairs_within(labels[labels >= 0]))
    return FalseNegatives(len(units), [size for size in batch_sizes if size <= len(units)], pairs)


def renumbered(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def shared_by(rows: Rows) -> tuple[dict[str, Shared], dict[str, list[tuple[int, int]]]]:
    """What each split has in common with one before it, counted in the second; nothing in common is left out."""
    shared, leaked = {}, {}
    for n, second in enumerate(rows.splits):
        for first in rows.splits[:n]:
            equal, alike = leaks(rows, first, second)
            known = rows.caption[rows.of(first)[rows.owner]]
            ours = rows.caption[rows.of(second)[rows.owner]]
            pairs = [*equal.items(), *alike.items()]
            example = (rows.items[pairs[0][1]].key, rows.items[pairs[0][0]].key) if pairs else None
            found = Shared(len(equal), len(alike), int(np.isin(ours, known).sum()), example)
            if found.images or found.alike or found.captions:
                shared[f"{first}/{second}"] = found
                leaked[f"{first}/{second}"] = pairs
    return shared, leaked


def groups_in(rows: Rows, split: str) -> list[list[int]]:
    """Rows of each group of pictures of the split that are the same or look the same, the largest groups first."""
    here = np.flatnonzero(in_split(rows, split))
    labels = looks_within(rows, split)[here] if len(here) else here
    found: dict[int, list[int]] = {}
    for row, label in zip(here.tolist(), labels.tolist(), strict=True):
        found.setdefault(label, []).append(row)
    return sorted((group for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group))
