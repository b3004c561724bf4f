"""Where the bytes of an image lie: in a file, in a tar, in a cell of a table, or in memory."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from clipft.data.index import open_shard, read_exactly
from clipft.data.sample import BadSample
from clipft.data.sources.extras import load_datasets, load_parquet


@dataclass(frozen=True, slots=True)
class Slice:
    """A member of a tar."""

    path: str
    stamp: tuple[int, int]
    """Size and mtime of the tar when it was indexed."""
    offset: int
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a Parquet file, which is read by row groups."""

    path: str
    group: int
    row: int
    column: str
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell of a Hugging Face dataset; `split` is empty where the folder has none."""

    path: str
    split: str
    row: int
    column: str
    name: str


Place = str | bytes | Slice | Cell | Entry
"""A str is the absolute path of a file."""


def read_place(place: Place) -> bytes:
    """The image's bytes; OSError or BadSample where they are not to be had."""
    match place:
        case str():
            with open(place, "rb") as file:
                return file.read()
        case bytes():
            return place
        case Slice():
            return read_exactly(open_shard(place.path, *place.stamp).fd, place.offset, place.size)
        case Cell():
            return bytes_in(read_group(place.path, place.group, place.column)[place.row].as_py())
        case Entry():
            return bytes_in(open_dataset(place.path, place.split)[place.row][place.column][0].as_py())


@lru_cache(2)
def read_group(path: str, group: int, column: str) -> Any:
    """A column of one row group, as pyarrow's array; BadSample where the file does not give it."""
    try:
        with load_parquet().ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(0)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise BadSample("read_error") from error


@lru_cache(8)
def open_dataset(path: str, split: str) -> Any:
    """A dataset whose rows come as pyarrow's tables, with images as they are stored."""
    return load_datasets(path)[split].with_format("arrow")


def bytes_in(value: Any) -> bytes:
    """What a cell holds: bytes, or the struct of bytes and path that Hugging Face stores."""
    raw = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(raw, bytes) or not raw:
        raise BadSample("no_image")
    return raw


def stem_of(place: Place) -> str:
    """What the image was called where it comes from, without extension; empty where it had no name."""
    match place:
        case bytes():
            return ""
        case Slice():
            return place.name
        case _:
            name = place if isinstance(place, str) else place.name
            return os.path.splitext(os.path.basename(name))[0]


def stamp_of(place: Place) -> tuple[Any, ...]:
    """What changes when the bytes there change, as far as one can tell without reading them."""
    match place:
        case str():
            return (place, *file_stamp(place))
        case bytes():
            return (hashlib.blake2b(place, digest_size=16).hexdigest(),)
        case Slice():
            return (place.path, *place.stamp, place.offset, place.size)
        case Cell():
            return (place.path, *table_stamp(place.path), place.group, place.row, place.column)
        case Entry():
            stamp = table_stamp(os.path.join(place.path, place.split, "state.json"))
            return (place.path, *stamp, place.split, place.row, place.column)


def file_stamp(path: str) -> tuple[int, int]:
    """Size and mtime, (-1, -1) where there is no such file."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


table_stamp = lru_cache(4096)(file_stamp)
