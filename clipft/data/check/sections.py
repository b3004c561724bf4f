"""Figures -> the parts of a report, once for the terminal and for the page: tables, bars, pictures, notes."""

import os
from dataclasses import dataclass, field

from clipft.data.check.advice import Case, share
from clipft.data.check.figures import EXAMPLES, PICTURES, Figures
from clipft.data.check.items import Item, Tar
from clipft.data.check.rows import Rows
from clipft.data.sample import printable
from clipft.data.split import counted

FEW_TARS = 12  # shown in a terminal
MOST_TARS = 500  # shown on the page
FLAGS = {
    "dark": "Dark: less than 1 in 100 pixels is brighter than a quarter",
    "flat": "Flat: hardly more than one colour",
    "blurred": "Blurred",
    "tiny": "Tiny: the shorter side is less than a quarter of what the model sees",
    "odd_aspect": "More than three times as long as wide",
}


@dataclass(frozen=True)
class Grid:
    """Columns of text; all but the first `left` ones are numbers."""

    header: list[str]
    rows: list[list[str]]
    left: int = 1


@dataclass(frozen=True)
class Picture:
    row: int
    words: str
    """Its first caption; empty where it has none."""
    key: str


@dataclass(frozen=True)
class Strip:
    """Pictures side by side."""

    title: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Section:
    title: str
    notes: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    bars: list[tuple[str, int]] = field(default_factory=list)
    bars_of: str = ""
    strips: list[Strip] = field(default_factory=list)
    page_only: list[Grid] = field(default_factory=list)
    """Grids too long for a terminal."""


def sections_of(case: Case, rows: Rows) -> list[Section]:
    figures = case.figures
    return [
        counts(case),
        dropped(figures, rows.items),
        captions(case),
        duplicates(figures, rows),
        batches(case),
        shared(figures, rows),
        images(case, rows),
        samples(figures, rows),
    ]


def counts(case: Case) -> Section:
    header = ["split", "shards", "samples", "usable", "dropped", "captions", "labelled", "MB of images"]
    body = [
        [
            split,
            *(f"{n:,}" for n in (each.tars, each.indexed, each.usable, each.indexed - each.usable)),
            *(f"{n:,}" for n in (each.captions, each.labelled)),
            f"{each.num_bytes / 1e6:,.1f}",
        ]
        for split, each in case.figures.splits.items()
    ]
    if not case.contents.packed:
        header, body = [header[0], *header[2:]], [[row[0], *row[2:]] for row in body]
    tars = tar_grid(case)
    few = 0 < len(tars.rows) <= FEW_TARS
    left = len(case.figures.tars) - MOST_TARS
    return Section(
        "What there is",
        [
            *case.contents.notes,
            *([f"{left:,} more shards than the first {MOST_TARS} are not listed"] if left > 0 else []),
        ],
        [Grid(header, body), *([tars] if few else [])],
        page_only=[] if few or not tars.rows else [tars],
    )


def tar_grid(case: Case) -> Grid:
    body = [
        [os.path.relpath(tar.path, case.contents.place), tar.split, f"{tar.samples:,}", f"{usable:,}", megabytes(tar)]
        for tar, usable in case.figures.tars[:MOST_TARS]
    ]
    header = ["shard", "split", "samples", "usable", "MB"]
    if any(tar.problems for tar, _ in case.figures.tars):
        header.append("damage")
        body = [[*row, "; ".join(tar.problems)] for row, (tar, _) in zip(body, case.figures.tars, strict=False)]
    return Grid(header, body, left=2)


def megabytes(tar: Tar) -> str:
    return f"{tar.num_bytes / 1e6:,.1f}"


def dropped(figures: Figures, items: list[Item]) -> Section:
    body = [
        [reason, f"{len(found):,}", ", ".join(place_of(items[i]) for i in found[:EXAMPLES])]
        for reason, found in figures.dropped.items()
    ]
    if not body:
        return Section("What cannot be used", ["Every sample can be used."])
    return Section("What cannot be used", grids=[Grid(["reason", "samples", "such as"], body)])


def place_of(item: Item) -> str:
    return printable(item.key) + (f" (byte {item.byte})" if item.byte >= 0 else "")


def captions(case: Case) -> Section:
    lengths, figures = case.figures.lengths, case.figures
    if lengths is None:
        return Section("Captions", ["There are no captions."])
    limit = case.reader.context_length
    notes = [
        f"{lengths.number:,} captions: half have at most {lengths.median} tokens, 99 of 100 at most "
        f"{lengths.ninety_nine}, the longest {lengths.most} (tokenizer of {case.reader.name}, start and end counted)",
        f"{lengths.cut:,} ({share(lengths.cut, lengths.number)}) have more than {limit} tokens and are cut",
    ]
    scripts = Grid(
        ["script", "captions", "share", "median tokens", "cut"],
        [
            [name, f"{s.captions:,}", share(s.captions, lengths.number), f"{s.median_tokens}", f"{s.cut:,}"]
            for name, s in figures.scripts.items()
        ],
    )
    bars = [(f"{low}" if low == high else f"{low}-{high}", number) for low, high, number in lengths.bars]
    return Section("Captions", notes, [scripts], bars, "tokens")


def duplicates(figures: Figures, rows: Rows) -> Section:
    header = ["split", "images", "the same again", "similar again", "captions", "equal again"]
    body = [
        [split, *(f"{n:,}" for n in (s.usable, s.duplicates, s.near, s.captions, s.equal_captions))]
        for split, s in figures.splits.items()
    ]
    grids = [Grid(header, body)]
    if figures.repeated:
        repeated = [[printable(text[:100]), f"{number:,}"] for text, number in figures.repeated]
        grids.append(Grid([f"captions repeated most in {figures.trained}", "times"], repeated))
    large = [group for group in figures.groups if len(group) > 2]
    pairs = [row for group in figures.groups[len(large) :][:PICTURES] for row in group]
    strips = [
        Strip(f"{counted(len(group), 'image')} that look the same", [picture(rows, i) for i in group[:PICTURES]])
        for group in large[: PICTURES // 2]
    ]
    strips += [Strip("pairs that look the same", [picture(rows, i) for i in pairs])] if pairs else []
    notes = [f"{counted(len(figures.groups), 'group')} of same or similar images in {figures.trained}"]
    return Section("Repeats", notes, grids, strips=strips)


def batches(case: Case) -> Section:
    found, split = case.figures.negatives, case.figures.trained
    if not found.batch_sizes:
        none = f"{split} has {found.number:,} images with captions: no batch of these sizes."
        return Section("Pairs of a batch that belong together", [none])
    body = [[kind, *(decimals(found.expected(kind, size)) for size in found.batch_sizes)] for kind in found.pairs]
    unit = "pairs of image and caption" if case.data.captions == "all" else "images, one caption of each drawn"
    notes = [
        f"expected number of pairs in a batch from {found.number:,} {unit}: B(B-1) / (N(N-1)) times those of {split}. "
        "By default equal captions are positives (loss.positives=caption), and all others of these count as negatives."
    ]
    return Section(
        "Pairs of a batch that belong together",
        notes,
        [Grid(["pairs with", *(f"B={n:,}" for n in found.batch_sizes)], body)],
    )


def decimals(value: float) -> str:
    """Three decimals, fewer of large numbers, and never a zero that is none."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def shared(figures: Figures, rows: Rows) -> Section:
    if not figures.shared:
        what = (
            "One split: nothing to compare." if len(figures.splits) < 2 else "The splits share no image and no caption."
        )
        return Section("Shared between splits", [what])
    body = [
        [sides, f"{found.images:,}", f"{found.alike:,}", f"{found.captions:,}"]
        for sides, found in figures.shared.items()
    ]
    strips = [
        Strip(
            f"{sides}: in both",
            [each for a, b in pairs[: PICTURES // 2] for each in (picture(rows, b), picture(rows, a))],
        )
        for sides, pairs in figures.leaked.items()
        if pairs
    ]
    header = ["splits", "same images", "similar images", "equal captions"]
    return Section("Shared between splits", ["counted in the second of the two"], [Grid(header, body)], strips=strips)


def images(case: Case, rows: Rows) -> Section:
    figures = case.figures
    total = sum(each.usable for each in figures.splits.values())
    if not total:
        return Section("Images", ["There is no image that can be used."])
    kinds = [[name, f"{number:,}"] for name, number in figures.formats.items()]
    modes = [[name, f"{number:,}"] for name, number in figures.modes.items()]
    odd = [[FLAGS[name], f"{int(figures.flags[name].sum()):,}"] for name in FLAGS]
    looks = rows.seen.looks[rows.usable]
    notes = [
        f"shorter side: half have at least {figures.median_side} pixels, {share(figures.smaller, total)} fewer than "
        f"the {case.reader.image_size} that {case.reader.name} sees",
        f"bytes: half at most {int(sorted(looks['bytes'])[total // 2]):,}, the largest {int(looks['bytes'].max()):,}",
    ]
    strips = [
        Strip(title, [picture(rows, int(i)) for i in worst(figures, rows, name)[:PICTURES]])
        for name, title in FLAGS.items()
    ]
    return Section(
        "Images",
        notes,
        [Grid(["format", "images"], kinds), Grid(["mode", "images"], modes), Grid(["odd", "images"], odd)],
        [(f"{low}" if low == high else f"{low}-{high}", number) for low, high, number in figures.sides],
        "shorter side in pixels",
        [strip for strip in strips if strip.pictures],
    )


def worst(figures: Figures, rows: Rows, name: str) -> list[int]:
    """The rows with this flag, those that deserve it most first."""
    looks = rows.seen.looks
    sides = looks["height"].astype(float), looks["width"].astype(float)
    by = {"dark": looks["light"], "blurred": looks["sharpness"], "tiny": sides[0] * sides[1]}
    found = figures.flags[name].nonzero()[0].tolist()
    return sorted(found, key=lambda i: by[name][i]) if name in by else found


def samples(figures: Figures, rows: Rows) -> Section:
    """Pictures from all over each split."""
    strips = []
    for split in rows.splits:
        here = (rows.of(split) & rows.usable).nonzero()[0].tolist()
        number = min(PICTURES, len(here))
        chosen = [here[n * len(here) // number] for n in range(number)]
        strips += [Strip(split, [picture(rows, i) for i in chosen])] if chosen else []
    return Section("Samples", strips=strips)


def picture(rows: Rows, row: int) -> Picture:
    captions = rows.seen.captions[row]
    return Picture(row, captions[0] if captions else "", rows.items[row].key)
