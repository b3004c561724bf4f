"""Which split the name of a shard stands for, and the order of such names."""

import re
from collections.abc import Iterable

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
SPLIT_OF = {alias: split for split, aliases in SPLITS.items() for alias in aliases}


def ordered(names: set[str]) -> list[str]:
    """Splits in their order: train, val and test first, then the others by name."""
    return [split for split in SPLITS if split in names] + sorted(names - set(SPLITS))


def natural(path: str) -> list[str | int]:
    """Sort key that puts x-2.tar before x-10.tar."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"([0-9]+)", path))]


def sorted_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of tars by split, train-000.tar and train/000.tar, each in its order; those of no split are left out."""
    shards: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        split = SPLIT_OF.get(re.split(r"[-_./]", name, maxsplit=1)[0].lower())
        if split:
            shards[split].append(name)
    return {split: sorted(found, key=natural) for split, found in shards.items()}
