"""Shards or a source -> everything in it, one item each, with the places of its bytes; no image is read yet."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clipft.config import DataConfig
from clipft.data.index import Samples, join, shown_key
from clipft.data.manifest import Listed, listed_beside
from clipft.data.pack import class_order
from clipft.data.rows import read_rows
from clipft.data.sample import IMAGE_KINDS, TEXT_KINDS, printable
from clipft.data.shard import ShardIndex, scan_shard
from clipft.data.sources.place import Place, Slice
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, text_members
from clipft.data.split import CLASSNAMES, VAL_FRAC, counted, held_out, read_lines, stray
from clipft.data.verify import shards_of

HELD_OUT = "val"


@dataclass(slots=True)
class Item:
    """A sample of a shard, or an image of a source with all its rows."""

    key: str
    split: str
    shard: str
    """The tar; empty for a source that is not packed."""
    byte: int
    """Of the sample's first header in its tar, else -1."""
    image: Place | None
    texts: dict[str, Place]
    """By kind: json, txt, cls."""
    reason: str = ""
    """Why it cannot be used, where that is known already."""


@dataclass(frozen=True)
class Tar:
    split: str
    path: str
    num_bytes: int
    samples: int
    """With those that the index leaves out."""
    problems: list[str]


@dataclass(frozen=True)
class Contents:
    """All that there is."""

    name: str
    place: str
    items: list[Item]
    classnames: list[str]
    tars: list[Tar] = field(default_factory=list)
    """Of a source none."""
    notes: list[str] = field(default_factory=list)
    """How it was read, and what of it is no sample, in sentences."""
    limit: str | None = None
    """Folder that links of a source must not lead out of."""
    held_out: bool = False
    """Whether val is the share of train that training would hold out."""
    packed: bool = True


def items_of_source(ask: Ask) -> Contents:
    """The images of what `data pack` reads; rows that it would leave out are items with the reason."""
    source = open_source(ask)
    rows = read_rows(source)
    classnames = class_order({row.label for row in rows.usable if row.label is not None})
    number = {name: str(i).encode() for i, name in enumerate(classnames)}
    items = []
    for row in rows.usable:
        texts: dict[str, Place] = {"cls": number[row.label]} if row.label is not None else {}
        texts |= {"json": text_members({}, row.captions)["json"]} if row.captions else {}
        items.append(Item(row.key, row.split or "train", "", -1, row.image, texts))
    for bad in rows.dropped:
        where = f"{source.table} {bad.where}" if isinstance(bad.where, int) else str(bad.where)
        items.append(Item(printable(where), bad.split or "train", "", -1, None, {}, bad.reason))
    joined = rows.num_rows - len(rows.dropped) - len(rows.usable)
    notes = [source.said, *source.notes]
    notes += [f"{counted(joined, 'row')} belong to images of earlier rows"] if joined else []
    name = Path(ask.source).expanduser().resolve().name
    return Contents(name, ask.source, items, classnames, notes=notes, limit=source.limit, packed=False)


def items_of_data(config: DataConfig) -> Contents:
    """The samples of a data set's shards, from headers as they are now; also those that no training would see."""
    name, folder, splits = shards_of(config)
    listed = listed_beside([path for paths in splits.values() for path in paths])
    items, tars, ignored, doubts = [], [], Counter[str](), []
    for split, paths in splits.items():
        for path in paths:
            tar, index = scanned(split, path, listed.get(path))
            tars.append(tar)
            if index is not None:
                items += items_of_tar(split, path, index)
                ignored.update(index.ignored)
                doubts += [f"{path} may be cut: {what} (byte {at})" for at, what in index.doubts if path not in listed]
    notes = stray(ignored)
    holds_out = hold_out_items(config, items)
    if holds_out:
        notes.append("there is no val split: the share of train that training would hold out is shown as val")
    classnames = read_lines(folder / CLASSNAMES) or []
    return Contents(name, str(folder), items, classnames, tars, notes + doubts, held_out=holds_out)


def scanned(split: str, path: str, listed: Listed | None) -> tuple[Tar, ShardIndex | None]:
    """What the shard's headers say, and what is wrong with it."""
    try:
        index = scan_shard(path)
    except OSError as error:
        return Tar(split, path, 0, 0, [f"cannot be read: {error.strerror or error}"]), None
    problems = [f"{what} (byte {byte} of {index.size})" for byte, what in index.problems]
    if listed is not None and listed.bytes != index.size:
        problems.insert(0, f"it has {index.size} bytes, {listed.bytes} were written")
    elif listed is not None and listed.samples != len(index.keys):
        problems.insert(0, f"it holds {counted(len(index.keys), 'usable sample')}, {listed.samples} were written")
    total = len(index.keys) + sum(len(bad) for bad in index.dropped.values())
    return Tar(split, path, index.size, total, problems), index


def items_of_tar(split: str, path: str, index: ShardIndex) -> Iterator[Item]:
    samples = join([path], [index])
    for i in range(len(samples)):
        places = places_of(samples, i)
        image = next(places[kind] for kind in IMAGE_KINDS if kind in places)
        texts: dict[str, Place] = {kind: places[kind] for kind in TEXT_KINDS if kind in places}
        reason = "in_damaged_shard" if index.problems else ""
        yield Item(samples.key(i), split, path, samples.byte(i), image, texts, reason)
    for reason, bad in index.dropped.items():
        for key, byte in bad.items():
            yield Item(shown_key(path, key), split, path, byte, None, {}, reason)


def places_of(samples: Samples, i: int) -> dict[str, Slice]:
    """Where the members of a sample lie, by kind."""
    shard, first, end, _, _ = samples.rows[i].tolist()
    size, mtime_ns = samples.stamps[shard].tolist()
    return {
        samples.kinds[kind]: Slice(samples.shards[shard], (size, mtime_ns), offset, length, "")
        for kind, offset, length in samples.members[first:end].tolist()
    }


def hold_out_items(config: DataConfig, items: list[Item]) -> bool:
    """Gives the samples that training would hold out their split, where no val is given."""
    splits = {item.split for item in items}
    if "val" in splits and config.val_frac is not None:
        raise ValueError(f"data.val_frac={config.val_frac} would be ignored: the set has a val split. Leave it out.")
    train = [item for item in items if item.split == "train" and item.image is not None]
    if "val" in splits or len(train) < 2:
        return False
    frac = VAL_FRAC if config.val_frac is None else config.val_frac
    for item, out in zip(train, held_out([item.key for item in train], frac).tolist(), strict=True):
        item.split = HELD_OUT if out else item.split
    return True
