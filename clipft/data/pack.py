"""A source of any kind -> WebDataset shards with their indexes and shards.json."""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipft.config import ImageConfig, PackConfig
from clipft.data.building import Building, building, move_into_place
from clipft.data.draw import Shared, check_draw, draw_splits, find_near, find_shared, wants_looks
from clipft.data.fingerprint import KINDS
from clipft.data.manifest import CLASSNAMES, MANIFEST, TEMPLATES, write_manifest
from clipft.data.names import ordered
from clipft.data.prompts import templates_of
from clipft.data.rows import Rows, by_reason, leave_out, look_at_rows, named, read_rows
from clipft.data.sample import printable
from clipft.data.sources.recognise import open_source
from clipft.data.sources.row import Ask, Bad, Row, Source
from clipft.data.split import counted
from clipft.data.workers import num_workers
from clipft.data.write import Shard, Written, write_shards
from clipft.files import replace_file

DROPPED = "dropped.tsv"


@dataclass(frozen=True)
class Packed:
    """What lies in the shards, by split in their order."""

    out: str
    splits: dict[str, list[Written]]
    classnames: list[str]


@dataclass(frozen=True)
class Report:
    """What became of a source."""

    source: Source
    rows: Rows
    packed: Packed
    shared: dict[str, Shared]
    """By "train/val" and the like."""
    labels_as_captions: bool


def pack(config: PackConfig) -> Report:
    """Write the usable rows of source as shards into out, which appears in one move; says what was left out.

    The same source gives the same bytes: packing again changes nothing. An out with other content is refused. Killed
    at any time, it goes on with what is not finished when it is run again.
    """
    refuse_foreign(config.out, config.source)
    workers, templates = num_workers(config.workers), templates_of(config.templates)
    source = open_source(Ask(config.source, config.format, config.root, config.columns, config.csv))
    print("\n".join([source.said, *source.notes, *said_of_existing(config.out)]), flush=True)
    rows = read_rows(source)
    check_draw(config.split, rows.usable)
    if config.captions_from_labels and not any(row.label is not None for row in rows.usable):
        raise ValueError("captions_from_labels=true: the source has no labels.")
    with building(config.out) as place:
        deep = wants_looks(config.split, rows.usable)
        seen = look_at_rows(place, rows.usable, source.limit, deep, workers)
        rows, seen = leave_out(source, rows, seen)
        near = find_near(config.split, seen)
        splits = draw_splits(config.split, rows.usable, seen, near)
        shared = find_shared(rows.usable, splits, seen, near) if deep else {}
        tell_drawn(rows.usable, splits)
        if config.captions_from_labels:
            add_label_captions(rows.usable, templates)
        kinds = [KINDS[kind] for kind in seen["kind"].tolist()]
        parts = cut(rows.usable, splits, kinds, config.shard_samples)
        packed = fill(place, config.out, parts, config.image, templates, rows.dropped, shared, workers)
        move_into_place(config.out, place)
    return Report(source, rows, packed, shared, config.captions_from_labels)


def write_set(out: str, rows: list[Row], kind: str, shard_samples: int, templates: list[str]) -> Packed:
    """Write rows with keys and splits, whose images are known to be of this kind, as the packed folder `out`."""
    with building(out) as place:
        parts = cut(rows, [row.split or "train" for row in rows], [kind] * len(rows), shard_samples)
        packed = fill(place, out, parts, ImageConfig(), templates, [], {}, workers=1)
        move_into_place(out, place)
    return packed


def refuse_foreign(name: str, source: str) -> None:
    """Raise when out holds files that no packing put there, lies in the source, or is where nothing can be written."""
    out, folder = Path(name).expanduser(), Path(source).expanduser()
    if folder.is_dir() and folder.resolve() in [out.resolve(), *out.resolve().parents]:
        raise ValueError(
            f"out={name!r} lies in source={source!r}, which would not be the same source any more. Choose a folder "
            "outside of it, or give the table itself as source."
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={name!r} is a file. Choose a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ValueError(f"out={name!r} is not empty and holds no {MANIFEST}. Choose a folder that does not exist yet.")
    above = next(parent for parent in Path(os.path.abspath(out)).parents if os.path.lexists(parent))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        state = "may not be written to" if os.path.isdir(above) else "is no folder"
        raise ValueError(f"out={name!r} cannot be made: {above} {state}. Choose another place.")


def said_of_existing(name: str) -> list[str]:
    """A sentence where out is a packed set already."""
    there = (Path(name).expanduser() / MANIFEST).is_file()
    return [f"{name} is there already: it stays as it is, and another set under its name is refused"] if there else []


def add_label_captions(rows: list[Row], templates: list[str]) -> None:
    """Gives labelled rows without a caption one from each template."""
    captions: dict[str, list[str]] = {}  # of each label, shared by its rows
    for row in rows:
        if row.label is not None and not row.captions:
            if row.label not in captions:
                captions[row.label] = [template.replace("{c}", row.label) for template in templates]
            row.captions = captions[row.label]


def tell_drawn(rows: list[Row], splits: list[str]) -> None:
    """Writes the split that was drawn into the column that names another one."""
    for row, split in zip(rows, splits, strict=True):
        if split != (row.split or "train") and '"split"' in row.rest:
            values = json.loads(row.rest)
            row.rest = json.dumps({**values, "split": split} if "split" in values else values, ensure_ascii=False)


def cut(rows: list[Row], splits: list[str], kinds: list[str], shard_samples: int) -> dict[str, list[Shard]]:
    """The rows of each split as shards whose numbers of samples differ by at most one; row order is kept."""
    parts = {}
    for split in ordered(set(splits)):
        chosen = np.flatnonzero([name == split for name in splits]).tolist()
        count = -(-len(chosen) // shard_samples)
        bounds = [n * len(chosen) // count for n in range(count + 1)]
        parts[split] = [
            Shard(f"{split}-{n:05d}.tar", [rows[i] for i in chosen[start:stop]], [kinds[i] for i in chosen[start:stop]])
            for n, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
    return parts


def fill(
    place: Building,
    out: str,
    parts: dict[str, list[Shard]],
    image: ImageConfig,
    templates: list[str],
    dropped: list[Bad],
    shared: dict[str, Shared],
    workers: int,
) -> Packed:
    """Writes all files of the set where it is built."""
    shards = [shard for part in parts.values() for shard in part]
    classnames = class_order({row.label for shard in shards for row in shard.rows if row.label is not None})
    done = {each.name: each for each in write_shards(place, shards, classnames, image, workers)}
    splits = {split: [done[shard.name] for shard in part] for split, part in parts.items()}
    if classnames:
        write_lines(place.set / CLASSNAMES, classnames)
        write_lines(place.set / TEMPLATES, templates)
    if dropped:
        lines = [f"{bad.reason}\t{bad.where}\t{bad.split or ''}" for bad in dropped]
        write_lines(place.set / DROPPED, ["reason\trow\tsplit", *(printable_cells(line) for line in lines)])
    entries = {
        split: manifest_entry(part, [bad for bad in dropped if bad.split == split]) for split, part in splits.items()
    }
    more = {"dropped": reasons(dropped), "shared": {sides: asdict(found) for sides, found in shared.items()}}
    write_manifest(place.set, Path(os.path.abspath(Path(out).expanduser())).name, entries, more)
    return Packed(out, splits, classnames)


def class_order(labels: set[str]) -> list[str]:
    """Labels in class order: by number where all are numbers, else by text."""
    if all(re.fullmatch("[0-9]+", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def manifest_entry(part: list[Written], dropped: list[Bad]) -> dict[str, Any]:
    keys = ("name", "samples", "bytes", "sha256")
    return {
        "shards": [{key: getattr(shard, key) for key in keys} for shard in part],
        "captions": sum(shard.captions for shard in part),
        "dropped": reasons(dropped),
    }


def reasons(dropped: list[Bad]) -> dict[str, int]:
    return dict(Counter(bad.reason for bad in dropped))


def printable_cells(line: str) -> str:
    return "\t".join(printable(cell) for cell in line.split("\t", 2))


def write_lines(path: Path, lines: list[str]) -> None:
    replace_file(path, "".join(f"{line}\n" for line in lines))


def describe(report: Report) -> str:
    """A table with one line per split, then what was joined, left out, and what splits have in common."""
    rows, packed = report.rows, report.packed
    lines = [f"{'split':<10} {'shards':>7} {'samples':>9} {'captions':>9}"]
    for split, shards in packed.splits.items():
        samples, captions = sum(each.samples for each in shards), sum(each.captions for each in shards)
        lines.append(f"{split:<10} {len(shards):>7} {samples:>9,} {captions:>9,}")
    if packed.classnames:
        lines.append(f"{len(packed.classnames)} classes")
    num_joined = rows.num_rows - len(rows.dropped) - len(rows.usable)
    if num_joined:
        repeats = f", {rows.num_repeated:,} of them repeat a caption" if rows.num_repeated else ""
        lines.append(f"{counted(num_joined, 'row')} belong to images of earlier rows{repeats}")
    for reason, where in by_reason(rows.dropped).items():
        hint = f": {report.source.hints[reason]}" if reason in report.source.hints else ""
        lines.append(f"left out: {len(where):,} {reason} ({named(report.source, where)}){hint}")
    if rows.dropped:
        lines.append(f"all of them are listed in {packed.out}/{DROPPED}")
    lines += [line for sides, found in report.shared.items() for line in said_of_shared(sides, found)]
    lines += [line for shards in packed.splits.values() for line in said_of_scaling(shards)]
    if report.labels_as_captions:
        lines.append(
            "captions come from labels: train with loss.positives=group loss.group=label, or prompts of one "
            "class are negatives of each other"
        )
    return "\n".join([*lines, f"packed into {packed.out}"])


def said_of_shared(sides: str, found: Shared) -> list[str]:
    """What to say of a split that has images or captions of another one."""
    first, second = sides.split("/")
    lines = []
    if found.images or found.alike:
        assert found.example is not None
        same = [f"{counted(found.images, 'image')} also in {first}"] if found.images else []
        same += [f"{counted(found.alike, 'look-alike')} of images in {first}"] if found.alike else []
        lines.append(f"{second}: {', '.join(same)}, such as {found.example[1]} and {found.example[0]}")
    if found.captions:
        lines.append(f"{second}: {counted(found.captions, 'caption')} also in {first}")
    return lines


def said_of_scaling(shards: list[Written]) -> list[str]:
    return [
        f"{shard.name}: {counted(len(keys), 'image')} not scaled down, bytes kept ({reason}, such as {keys[0]})"
        for shard in shards
        for reason, keys in shard.not_scaled.items()
    ]
