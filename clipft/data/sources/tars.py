"""WebDataset shards -> rows, read by their index; also what img2dataset has downloaded."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from clipft.data.caption import caption_list, parse_json, read_label, read_utf8
from clipft.data.index import Samples, join, refuse_damage
from clipft.data.manifest import MANIFEST, listed_shards
from clipft.data.names import natural, ordered
from clipft.data.sample import IMAGE_KINDS, BadSample
from clipft.data.shard import ShardIndex, scan_shard
from clipft.data.sources.place import Slice
from clipft.data.sources.row import Ask, Bad, Raw, Source
from clipft.data.sources.tables import Part, split_name, table_source
from clipft.data.split import CLASSNAMES, by_prefix, expand_pattern, home_of, read_lines

NUMBER = re.compile(r"^[0-9]{6,}-")  # that packing put before the name


def tar_source(ask: Ask, path: Path) -> Source:
    """All shards of a folder, by split as shards.json or their names say, or those that a pattern names.

    They are indexed anew, so that damage is named with its byte; nothing is written beside them.
    """
    shards = shards_of(ask, path)
    paths = [shard for names in shards.values() for shard in names]
    indexes = [scan_shard(shard) for shard in paths]
    refuse_damage(paths, indexes)
    home = home_of(paths[0])[0]
    classnames = read_lines(home / CLASSNAMES) or []
    found = dict(zip(paths, indexes, strict=True))
    read = partial(read_tar, indexes=found, classnames=classnames)
    parts = [Part(Path(shard), split) for split, names in shards.items() for shard in names]
    source = table_source(ask, "", parts, read, "sample", captioned=True)
    kind = "WebDataset shards" + (" of img2dataset" if stats_of(paths[0]).is_file() else "")
    said = [f"{len(paths)} tars", f"splits {' '.join(filter(None, shards))}" if any(shards) else ""]
    said += [f"from json {source.columns}" if source.columns != "none" else ""]
    return replace(
        source,
        said=f"read as: {kind}, {', '.join(filter(None, said))} (override with columns.caption=... format=...)",
        limit=None,
        notes=[*short_shards(found), *unnamed(found, home / CLASSNAMES)],
    )


def shards_of(ask: Ask, path: Path) -> dict[str | None, list[str]]:
    """Paths by split; None where nothing names one."""
    if not path.is_dir():
        return {None: expand_pattern("source", ask.source)}
    if (path / MANIFEST).is_file():
        return {
            split: [str(each.path) for each in entries] for split, entries in listed_shards(path).items() if entries
        }
    named = {split: names for split, names in by_prefix(path).items() if names}
    known = {name for names in named.values() for name in names}
    plain = sorted((str(shard) for shard in path.glob("*.tar") if str(shard) not in known), key=natural)
    if not named:
        return {None: plain}
    found: dict[str | None, list[str]] = {split: named[split] for split in ordered(set(named))}
    for shard in plain:  # beside shards of splits these are of another one, never training data
        found.setdefault(split_name(re.split(r"[-_.]", Path(shard).name)[0]), []).append(shard)
    return found


def read_tar(path: Path, indexes: dict[str, ShardIndex], classnames: list[str]) -> Iterator[Raw | Bad]:
    """Usable samples in the order of the tar, then those that the index left out."""
    index = indexes[str(path)]
    samples = join([str(path)], [index])
    for i in range(len(samples)):
        where = f"{path.stem}/{index.keys[i]}"
        try:
            yield to_raw(samples, i, where, classnames)
        except BadSample as bad:
            yield Bad(where, bad.reason)
    for reason, keys in index.dropped.items():
        yield from (Bad(f"{path.stem}/{key}", reason) for key in keys)


def to_raw(samples: Samples, i: int, where: str, classnames: list[str]) -> Raw:
    """A sample's columns and text, and where its image lies."""
    members = samples.read(i, ("json", "txt", "cls"))
    values = parse_json(members["json"]) if "json" in members else {}
    captions = caption_list(read_utf8(members["txt"]).split("\n")) if "txt" in members else []
    label = None
    if "cls" in members and (number := read_label(members["cls"])) >= 0:
        if classnames and number >= len(classnames):
            raise BadSample("label_without_class")
        label = classnames[number] if classnames else str(number)
    return Raw(where, values if isinstance(values, dict) else {}, image_in(samples, i, where), captions, label)


def image_in(samples: Samples, i: int, where: str) -> Slice:
    shard, first, end, _, _ = samples.rows[i].tolist()
    found = {samples.kinds[kind]: (offset, size) for kind, offset, size in samples.members[first:end].tolist()}
    offset, size = next(found[kind] for kind in IMAGE_KINDS if kind in found)
    stamp = tuple(samples.stamps[shard].tolist())
    name = NUMBER.sub("", where.rpartition("/")[2])
    return Slice(samples.shards[shard], (stamp[0], stamp[1]), offset, size, name)


def stats_of(shard: str) -> Path:
    """Where img2dataset writes down what it put into a shard."""
    return Path(shard).with_name(Path(shard).stem + "_stats.json")


def short_shards(indexes: dict[str, ShardIndex]) -> list[str]:
    """A sentence for each shard that holds not as many images as img2dataset wrote down, or has no such note."""
    notes = []
    stats = {path: stats_of(path) for path in indexes}
    if not any(file.is_file() for file in stats.values()):
        return []
    for path, file in stats.items():
        if not file.is_file():
            notes.append(f"{path} has no {file.name}: img2dataset may not have finished it")
            continue
        try:
            wanted: Any = json.loads(file.read_text("utf-8"))["successes"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        held = len(indexes[path].keys) + sum(len(keys) for keys in indexes[path].dropped.values())
        if held != wanted:
            notes.append(f"{path} holds {held:,} samples, {file.name} says {wanted:,}")
    return notes


def unnamed(indexes: dict[str, ShardIndex], classnames: Path) -> list[str]:
    """A sentence where labels have no names."""
    labelled = not classnames.is_file() and any("cls" in index.kinds for index in indexes.values())
    return [f"labels are packed by number: there is no {classnames}"] if labelled else []
