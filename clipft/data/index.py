"""Shards to samples: every shard's headers are parsed once, a read after that is one positional read."""

import hashlib
import json
import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from clipft.data.remote.cache import Remote
from clipft.data.sample import IMAGE_KINDS, TEXT_KINDS, BadSample, printable
from clipft.data.shard import ShardIndex, scan_shard
from clipft.data.tail import BLOCK
from clipft.files import replace_file, user_cache

VERSION = 5  # of the index file; another version is scanned again
OPEN_SHARDS = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2  # at once in a process; the usual limit is 1024


def index_places(path: str | Path) -> list[Path]:
    """Where the index of a shard may lie: beside it, else in the user's cache."""
    path = Path(path)
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return [
        path.with_name(path.name + ".index.json"),
        user_cache() / "index" / f"{digest}-{path.name}.json",
    ]


def read_index(place: Path) -> ShardIndex | None:
    """The stored index; None when there is none that can be used."""
    try:
        return parse_index(place.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def parse_index(text: str) -> ShardIndex | None:
    """The index that an index file holds; None when it cannot be used."""
    try:
        stored = json.loads(text)
        if stored.pop("sha256") != seal(stored):  # a flipped digit in it would make wrong pairs
            return None
        for name in ("problems", "doubts"):
            stored[name] = [(byte, what) for byte, what in stored[name]]
        return ShardIndex(**stored)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def index_text(index: ShardIndex) -> str:
    """What an index file holds."""
    stored = asdict(index)
    return json.dumps({"sha256": seal(stored), **stored}, separators=(",", ":"))


def seal(stored: dict[str, Any]) -> str:
    """What the index file of this version names as the sha256 of its content."""
    return hashlib.sha256(json.dumps([VERSION, stored]).encode()).hexdigest()


def write_index(path: str | Path) -> ShardIndex:
    """Scan a shard and store its index."""
    index = scan_shard(path)
    text = index_text(index)
    for place in index_places(path):
        with suppress(OSError):  # a read-only or full place; without any place the shard is scanned at each start
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, text)
            return index
    return index


def load_index(path: str | Path) -> ShardIndex:
    """The stored index of a shard; scanned and stored again when the shard's size or mtime is another one."""
    stat = os.stat(path)
    for place in index_places(path):
        index = read_index(place)
        if index is not None and (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
    return write_index(path)


class OpenShard:
    """A file descriptor that closes itself when the cache lets go of it."""

    def __init__(self, path: str, size: int, mtime_ns: int):
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadSample("read_error") from error
        self.stamp = size, mtime_ns
        self.check()

    def check(self) -> None:
        """BadSample when the file was written again since it was indexed: its members lie elsewhere now."""
        stat = os.fstat(self.fd)
        if (stat.st_size, stat.st_mtime_ns) != self.stamp:
            raise BadSample("shard_changed")

    def __del__(self, close=os.close):  # at the end of the interpreter `os` may be gone
        if hasattr(self, "fd"):
            close(self.fd)


# pread has no file position, so processes made by fork may share these descriptors.
open_shard = lru_cache(OPEN_SHARDS)(OpenShard)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of several shards as numpy columns: loader processes made by fork share the memory."""

    shards: list[str]
    stamps: Int64[np.ndarray, "shards 2"]
    """Size and mtime of each shard when it was indexed."""
    kinds: list[str]
    members: Int64[np.ndarray, "members 3"]
    """Number of the kind, offset, size."""
    names: bytes
    """All keys, one behind the other."""
    rows: Int64[np.ndarray, "samples 5"]
    """Shard, first member, end of members, first byte of the key, end of the key."""
    fingerprint: str
    """sha256 over names, sizes and index contents of the shards, in order; never mtime or folder."""
    dropped: dict[str, int]
    """Reason -> number of samples in these shards that the index left out."""
    examples: dict[str, str]
    """Reason -> the first of these samples, with its shard and byte."""
    ignored: dict[str, int]
    """Reason -> number of members that belong to no sample."""
    doubts: dict[str, str]
    """Shard that may have lost its last samples -> why it seems so."""
    remote: Remote | None = None
    """Those of the shards that lie elsewhere: their paths are places in a cache, where they are brought to be read."""

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        """The sample's key behind its shard's name, printable whatever the bytes of the name are."""
        shard, _, _, start, end = self.rows[i].tolist()
        return shown_key(self.shards[shard], self.names[start:end].decode("utf-8", "backslashreplace"))

    def byte(self, i: int) -> int:
        """Where the sample's first header lies in its shard."""
        return int(self.members[self.rows[i, 1], 1]) - BLOCK

    def read(self, i: int, kinds: tuple[str, ...] = IMAGE_KINDS + TEXT_KINDS) -> dict[str, bytes]:
        """The bytes of the members with these extensions, by extension, in the order of the tar."""
        shard, first, end, _, _ = self.rows[i].tolist()
        found = {}
        with self.opened(shard) as file:
            for kind, offset, length in self.members[first:end].tolist():
                if self.kinds[kind] in kinds:
                    found[self.kinds[kind]] = read_exactly(file.fd, offset, length)
            file.check()  # behind the reads: one that met a write finds the time of the write
        return found

    @contextmanager
    def opened(self, shard: int) -> Iterator[OpenShard]:
        """The shard's file; one of the cache is held there until the end."""
        path, (size, mtime_ns) = self.shards[shard], self.stamps[shard].tolist()
        if self.remote is None or path not in self.remote.shards:
            yield open_shard(path, size, mtime_ns)
            return
        with self.remote.cache.held(self.remote.shards[path]):
            yield OpenShard(path, size, mtime_ns)

    def lost(self) -> str:
        """What the index left out, with an example of each reason."""
        return "; ".join(f"{n} {reason}, such as {self.examples[reason]}" for reason, n in self.dropped.items())

    def take(self, indices: Int64[np.ndarray, " taken"]) -> "Samples":
        """The samples at these positions, with a fingerprint of their own; what was left out stays behind."""
        digest = hashlib.sha256(self.fingerprint.encode() + indices.astype("<i8").tobytes())
        rows, fingerprint = self.rows[indices], digest.hexdigest()
        return replace(self, rows=rows, fingerprint=fingerprint, dropped={}, examples={}, ignored={}, doubts={})


def shown_key(path: str, key: str) -> str:
    """The key of a sample behind its shard's name."""
    return printable(f"{os.path.basename(path).removesuffix('.tar')}/{key}")


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """These bytes of the file; BadSample when the storage does not give them."""
    try:
        raw = os.pread(fd, length, offset)
        while len(raw) < length and (more := os.pread(fd, length - len(raw), offset + len(raw))):
            raw += more  # one call gives at most 2 GiB, and less on some network file systems
    except (OSError, OverflowError, MemoryError) as error:
        raise BadSample("read_error") from error
    if len(raw) < length:
        raise BadSample("short_read")
    return raw


def index_shards(paths: list[str], remote: Remote | None = None) -> Samples:
    """All usable samples of the shards, in order; damaged shards and a set without samples raise."""
    return samples_of(paths, [(remote and remote.index(path)) or load_index(path) for path in paths], remote)


def samples_of(paths: list[str], indexes: list[ShardIndex], remote: Remote | None = None) -> Samples:
    """The same from indexes that are there already."""
    refuse_damage(paths, indexes)
    samples = replace(join(paths, indexes), remote=remote)
    if not len(samples):
        raise ValueError(
            f"{printable(paths[0])}{' and others' if paths[1:] else ''}: no usable sample "
            f"({samples.lost() or 'no members at all'}). A sample is an "
            "image (key.jpg, key.png, ...) with key.txt, key.json or key.cls beside it in the same shard."
        )
    return samples


def refuse_damage(paths: list[str], indexes: list[ShardIndex]) -> None:
    """Raises where a shard is damaged, with the byte."""
    damaged = [(path, i.size, i.problems[0]) for path, i in zip(paths, indexes, strict=True) if i.problems]
    if damaged:
        path, size, (byte, what) = damaged[0]
        more = f" {len(damaged) - 1} more of the {len(paths)} shards are damaged." if damaged[1:] else ""
        raise ValueError(
            printable(f"{path}: {what} (byte {byte} of {size}).{more} ")
            + "Nothing of a damaged shard is used: copy or write it again, or leave it out."
        )


def join(paths: list[str], indexes: list[ShardIndex]) -> Samples:
    """The indexes of several shards as one."""
    kinds = sorted({kind for index in indexes for kind in index.kinds})
    code = {kind: number for number, kind in enumerate(kinds)}
    keys = [key.encode("utf-8", "surrogateescape") for index in indexes for key in index.keys]
    digest = hashlib.sha256()
    dropped, ignored = Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    for path, index in zip(paths, indexes, strict=True):
        content = [os.path.basename(path), index.size, index.keys, index.num_members]
        digest.update(json.dumps([*content, index.kinds, index.offsets, index.sizes]).encode())
        ignored.update(index.ignored)
        for reason, bad in index.dropped.items():
            dropped[reason] += len(bad)
            key, byte = next(iter(bad.items()))
            examples.setdefault(reason, printable(f"{key} (byte {byte} of {path})"))
    shard = np.repeat(np.arange(len(indexes)), [len(index.keys) for index in indexes])
    member_ends = np.cumsum(column(n for index in indexes for n in index.num_members))
    key_ends = np.cumsum(column(len(key) for key in keys))
    starts = [np.concatenate([[0], ends[:-1]])[: len(ends)] for ends in (member_ends, key_ends)]
    return Samples(
        shards=[str(path) for path in paths],
        stamps=np.array([(index.size, index.mtime_ns) for index in indexes], np.int64).reshape(-1, 2),
        kinds=kinds,
        members=np.stack(
            [
                column(code[kind] for index in indexes for kind in index.kinds),
                column(offset for index in indexes for offset in index.offsets),
                column(size for index in indexes for size in index.sizes),
            ],
            axis=1,
        ),
        names=b"".join(keys),
        rows=np.stack([shard, starts[0], member_ends, starts[1], key_ends], axis=1).astype(np.int64),
        fingerprint=digest.hexdigest(),
        dropped=dict(dropped),
        examples=examples,
        ignored=dict(ignored),
        doubts={
            str(path): printable(f"{what} (byte {byte} of {path})")
            for path, index in zip(paths, indexes, strict=True)
            for byte, what in index.doubts
        },
    )


def column(values: Iterable[int]) -> Int64[np.ndarray, " n"]:
    return np.fromiter(values, np.int64)
