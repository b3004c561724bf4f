"""Which split each row belongs to: the one its source names, or one drawn by groups that stay together."""

import hashlib
import itertools
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from clipft.config import DrawConfig
from clipft.data.alike import Pairs, components, near_images, same_value
from clipft.data.caption import caption_id, group_id
from clipft.data.names import ordered
from clipft.data.sources.row import Row


@dataclass(frozen=True)
class Shared:
    """What two splits have in common; counted are the images and captions of the second."""

    images: int
    """Of the same bytes."""
    alike: int
    """That look the same as an image of the first and have other bytes."""
    captions: int
    """Whose text is one of the first, but for case and spaces."""
    example: tuple[str, str] | None
    """Keys of two rows with the same image, or one that looks the same."""


def check_draw(config: DrawConfig, rows: list[Row]) -> None:
    """Raises where a split is asked for that the source has, or a column that no row has."""
    named = {row.split for row in rows}
    for split, share in (("val", config.val), ("test", config.test)):
        if share is not None and split in named:
            raise ValueError(
                f"split.{split}={share}: the source has a {split} split of its own. Leave this out, or say "
                "columns.split=none where a column names it."
            )
    if config.by not in ("image", "caption") and all(group_in(row, config.by) is None for row in rows):
        columns = ", ".join(json.loads(rows[0].rest))
        raise ValueError(f"split.by={config.by!r} is neither image nor caption nor a column with values ({columns}).")


def wants_looks(config: DrawConfig, rows: list[Row]) -> bool:
    """Whether images have to be compared: only where there is more than one split."""
    return config.val is not None or config.test is not None or len({row.split or "train" for row in rows}) > 1


def draw_splits(config: DrawConfig, rows: list[Row], seen: np.ndarray, near: Pairs) -> list[str]:
    """The split of each row. Rows of train, or of no split, are drawn by a hash of the group they belong to.

    Groups with the lowest hashes become val, those with the highest test, as many as come nearest to the share
    without passing it; neither order nor names of the rows decide.
    """
    splits = [row.split or "train" for row in rows]
    if config.val is None and config.test is None:
        return splits
    free = np.flatnonzero([split == "train" for split in splits])
    group, value = groups(config, rows, seen, near)
    names, member, sizes = np.unique(group[free], return_inverse=True, return_counts=True)
    order = np.lexsort((names, value[names]))
    drawn = np.full(len(names), "train", object)
    for split, share, candidates in (("val", config.val, order), ("test", config.test, order[::-1])):
        if share is not None:
            drawn[take([n for n in candidates.tolist() if drawn[n] == "train"], sizes, share * len(free))] = split
            if split not in drawn:
                raise ValueError(
                    f"split.{split}={share} of {len(free)} images, in {len(names)} groups by {config.by}, is none: "
                    "every group is larger. Make the share larger"
                    + (", or say split.near=false: images that look the same join groups." if len(near) else ".")
                )
    if "train" not in drawn:
        raise ValueError(f"split.val={config.val} and split.test={config.test} leave none of {len(free)} to train on.")
    for i, split in zip(free.tolist(), drawn[member].tolist(), strict=True):
        splits[i] = split
    return splits


def take(candidates: list[int], sizes: np.ndarray, wanted: float) -> list[int]:
    """The first groups that fit into so many rows; one of a single row always does."""
    room, taken = max(1, round(wanted)), []
    for name in candidates:
        if sizes[name] <= room:
            taken.append(name)
            room -= int(sizes[name])
        if not room:
            break
    return taken


def groups(
    config: DrawConfig, rows: list[Row], seen: np.ndarray, near: Pairs
) -> tuple[Int64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]:
    """For each row the lowest row of its group, and for that one a value that follows from the group's content."""
    values = seen["digest"].copy()
    connected = np.concatenate([same_value(values), near])
    if config.by == "caption":
        owners, ids = captions_of_rows(rows)
        connected = np.concatenate([connected, owners[same_value(ids)]])
    elif config.by != "image":
        names = [group_in(row, config.by) for row in rows]
        named = np.flatnonzero([name is not None for name in names])
        values[named] = [group_id(name) for name in names if name is not None]
        connected = np.concatenate([connected, named[same_value(values[named])]])
    group = components(len(rows), connected)
    least = np.full(len(rows), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, group, values)
    # Mixed, since the least of many values is a low one and groups of many would be drawn first.
    return group, np.array([mixed(int(value)) for value in least.tolist()], np.uint64)


def mixed(value: int) -> int:
    return int.from_bytes(hashlib.blake2b(value.to_bytes(8, "little"), digest_size=8).digest(), "little")


def group_in(row: Row, column: str) -> str | None:
    """The value of a column that came along, as a group's name; None where it is blank or missing."""
    value = row.label if column == "label" else json.loads(row.rest).get(column)
    text = "" if value is None or value != value else str(value).strip()
    return text or None


def captions_of_rows(rows: list[Row]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """For every caption of every row the row, and the id by which equal captions are known."""
    owners = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])
    ids = np.fromiter((caption_id(text) for row in rows for text in row.captions), np.int64, len(owners))
    return owners, ids


def find_near(config: DrawConfig, seen: np.ndarray) -> Pairs:
    """Pairs of rows whose images look the same, each the first of its bytes."""
    return near_images(seen, np.full(len(seen), config.near))


def find_shared(rows: list[Row], splits: list[str], seen: np.ndarray, near: Pairs) -> dict[str, Shared]:
    """What each split has in common with one before it, by "train/val" and the like; nothing in common is left out."""
    names = ordered(set(splits))
    split = np.array([names.index(name) for name in splits])
    digests = seen["digest"]
    same, look = partners(same_pairs(digests, split), split), partners(spread(near, digests, split), split)
    owners, ids = captions_of_rows(rows)
    shared = {}
    for first, second in itertools.combinations(range(len(names)), 2):
        equal, alike = same.get((first, second), {}), look.get((first, second), {})
        known = np.unique(ids[split[owners] == first])
        num_captions = int(np.isin(ids[split[owners] == second], known).sum())
        found = Shared(
            images=len(equal),
            alike=len(alike.keys() - equal.keys()),
            captions=num_captions,
            example=next(((rows[a].key, rows[b].key) for b, a in [*equal.items(), *alike.items()]), None),
        )
        if found.images or found.alike or found.captions:
            shared[f"{names[first]}/{names[second]}"] = found
    return shared


def same_pairs(digests: np.ndarray, split: np.ndarray) -> Pairs:
    """Pairs of rows with the same image: each row with the first of every split that has the image."""
    order = np.argsort(digests, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(digests[order])) + 1)
    pairs = []
    for run in runs:
        if len(run) > 1:
            firsts = {int(split[i]): int(i) for i in run[::-1]}
            pairs += [(first, int(i)) for i in run for first in firsts.values() if first != i]
    return np.array(pairs, np.int64).reshape(-1, 2)


def spread(near: Pairs, digests: np.ndarray, split: np.ndarray) -> Int64[np.ndarray, "rows 2"]:
    """Pairs of rows that look the same: each row of either image with the first of every split that has the other."""
    order = np.argsort(digests, kind="stable")
    known, pairs = digests[order], []
    for pair in near:
        starts, ends = (np.searchsorted(known, digests[pair], side=side) for side in ("left", "right"))
        one, other = (order[start:end].tolist() for start, end in zip(starts, ends, strict=True))
        for rows, partner in ((one, other), (other, one)):
            firsts = {int(split[i]): i for i in partner[::-1]}
            pairs += [(first, i) for i in rows for first in firsts.values()]
    return np.unique(np.sort(np.array(pairs, np.int64).reshape(-1, 2), axis=1), axis=0)


def partners(pairs: Pairs, split: np.ndarray) -> dict[tuple[int, int], dict[int, int]]:
    """For each two splits: rows of the second with a partner in the first."""
    found: dict[tuple[int, int], dict[int, int]] = {}
    for a, b in pairs.tolist():
        low, high = (a, b) if split[a] < split[b] else (b, a)
        if split[low] != split[high]:
            found.setdefault((int(split[low]), int(split[high])), {}).setdefault(high, low)
    return found
