"""A folder that datasets.save_to_disk wrote -> rows; images stay where they are until they are needed."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clipft.data.sources.extras import load_datasets
from clipft.data.sources.parquets import has_path, holds_bytes, source_with_bytes, with_names
from clipft.data.sources.place import Entry
from clipft.data.sources.row import Ask, Raw, Source
from clipft.data.sources.tables import Part, split_name

BATCH = 1000


def huggingface_source(ask: Ask, folder: Path) -> Source:
    datasets = load_datasets(str(folder.resolve()))
    features = next(iter(datasets.values())).features
    held = [name for name, feature in features.items() if holds_bytes(arrow_type(feature))]
    parts = [Part(folder / (split or "dataset"), split_name(split)) for split in datasets]
    read = partial(read_split, folder=str(folder.resolve()))
    return source_with_bytes(ask, "Hugging Face dataset", held, parts, read)


def arrow_type(feature: Any) -> Any:
    """pyarrow's type of a feature; features that are lists of others have none of their own and hold no bytes."""
    import pyarrow

    return feature() if callable(feature) else pyarrow.null()


def read_split(path: Path, folder: str, column: str | None, without: list[str]) -> Iterator[Raw]:
    """Rows of one split, numbered from 1; labels by name."""
    datasets = load_datasets(folder)
    split = path.name if path.name in datasets else ""
    dataset = datasets[split].with_format("arrow")
    names = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
    row = 0
    for table in dataset.iter(batch_size=BATCH):
        places = paths_in(table.column(column)) if column is not None else []
        for i, values in enumerate(table.drop_columns([*without, *([column] if column else [])]).to_pylist()):
            place = Entry(folder, split, row, column, places[i]) if column is not None else None
            row += 1
            yield Raw(row, with_names(values, names), image=place)


def paths_in(column: Any) -> list[str]:
    """The paths of a column of images, without its bytes being copied."""
    from pyarrow import compute

    if not has_path(column.type):
        return [""] * len(column)
    paths = compute.call_function("struct_field", [column], compute.StructFieldOptions("path"))
    return [path or "" for path in paths.to_pylist()]
