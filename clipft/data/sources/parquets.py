"""Parquet files -> rows, without the bytes of images that lie in their cells: those are read when they are needed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from clipft.data.sources.columns import IMAGES, only, plain
from clipft.data.sources.extras import load_parquet
from clipft.data.sources.place import Cell
from clipft.data.sources.row import Ask, Raw, Source
from clipft.data.sources.tables import Part, table_source

BATCH = 1000


def parquet_source(ask: Ask, parts: list[Part]) -> Source:
    parquet = load_parquet()
    try:
        schema = parquet.read_schema(parts[0].path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{parts[0].path} is no Parquet file ({error}).") from error
    held = [field.name for field in schema if holds_bytes(field.type)]
    return source_with_bytes(ask, "Parquet", held, parts, read_parquet, known_as="parquet")


def source_with_bytes(
    ask: Ask, kind: str, held: list[str], parts: list[Part], read: Callable[..., Iterator[Raw]], known_as: str = ""
) -> Source:
    """The source of tables of which these columns hold bytes: one of them the images, the others are left out.

    `read` is also told the `column` of the images, None where they are elsewhere, and the columns to go `without`.
    """
    column = ask.columns.image if ask.columns.image in held else None
    if column is None and ask.columns.image is None:
        named = [name for name in held if plain(name) in (*IMAGES, "jpg", "jpeg", "png", "webp")]
        column = only("image", named or held, ask.source)
    others = [name for name in held if name != column]
    said = kind + (f", images in column {column}" if column else "") + (f", not {', '.join(others)}" if others else "")
    if column is not None:
        ask = replace(ask, columns=replace(ask.columns, image=None))  # which would be a column of paths
    return table_source(ask, said, parts, partial(read, column=column, without=others), "row", known_as=known_as)


def holds_bytes(kind: Any) -> bool:
    """Whether cells of this type hold bytes, or the struct of bytes and path that Hugging Face stores."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


def read_parquet(path: Path, column: str | None, without: list[str]) -> Iterator[Raw]:
    """Rows numbered from 1; labels by name where Hugging Face has stored their names."""
    file = load_parquet().ParquetFile(path)
    schema = file.schema_arrow
    names = class_names(schema.metadata or {})
    columns = [name for name in schema.names if name not in (column, *without)]
    pathed = column is not None and has_path(schema.field(column).type)
    number = 0
    with file:
        for group in range(file.num_row_groups):
            read = [*columns, f"{column}.path"] if pathed else columns
            row = 0
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=read):
                for values in batch.to_pylist():
                    number += 1
                    place = None
                    if column is not None:
                        name = (values.pop(column, None) or {}).get("path") if pathed else None
                        place = Cell(str(path), group, row, column, name or "")
                    row += 1
                    yield Raw(number, with_names(values, names), image=place)


def has_path(kind: Any) -> bool:
    """Whether cells of this type are structs that name a path."""
    from pyarrow import types

    return types.is_struct(kind) and any(kind.field(i).name == "path" for i in range(kind.num_fields))


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of the classes by column, as datasets stores them in a Parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def with_names(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """The row with class numbers replaced by the names of the classes; -1 is how datasets writes a missing one."""
    for column, classes in names.items():
        number = values.get(column)
        if isinstance(number, int):
            values[column] = classes[number] if 0 <= number < len(classes) else None
    return values
