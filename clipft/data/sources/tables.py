"""Rows of tables of any kind -> rows of a source: columns chosen, paths resolved, splits named."""

import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipft.data.caption import encodable, is_visible
from clipft.data.names import SPLIT_OF, ordered
from clipft.data.sample import BadSample
from clipft.data.sources.columns import URL, Columns, Watch, captions_in_cell, choose, label_in_cell
from clipft.data.sources.paths import PROBED, Base, find_base, resolve
from clipft.data.sources.row import Ask, Bad, Raw, Row, Source, columns_json

HEAD = 1000  # rows by which columns are chosen


@dataclass(frozen=True)
class Part:
    """A table of a source, and the split that its name or folder says."""

    path: Path
    split: str | None = None


Read = Callable[[Path], Iterator[Raw | Bad]]


@dataclass(frozen=True)
class Plan:
    """How the rows of one part become rows of the source."""

    columns: Columns
    base: Base
    split: str | None
    several: bool
    """Whether there are other parts: numbers of rows then need the name of theirs."""
    item: str


def table_source(
    ask: Ask, kind: str, parts: list[Part], read: Read, item: str, captioned: bool = False, known_as: str = ""
) -> Source:
    """The source whose tables `read` gives the rows of; `item` is what these are numbered by, a line or a row.

    `known_as` is img2dataset's name for such tables, empty where it does not read them.
    """
    num_rows = max(PROBED, HEAD // len(parts))
    heads = {part: list(itertools.islice(read(part.path), num_rows)) for part in parts}
    raws = [row for head in heads.values() for row in head if isinstance(row, Raw)]
    whole = all(len(head) < num_rows for head in heads.values())
    columns = choose(ask.columns, raws, ask.source, captioned, whole) if raws else Columns(None, (), None, None)
    refuse_urls(ask, columns, raws, parts[0].path, known_as)
    plans = []
    for part, head in heads.items():
        names = [raw.values.get(columns.image) for raw in head if isinstance(raw, Raw) and columns.image is not None]
        base = find_base(part.path, Path(ask.source).expanduser(), ask.root, names)
        plans.append(Plan(columns, base, part.split, len(parts) > 1, item))
    names = f" in {parts[0].path.name}" if len(parts) == 1 else f" in {len(parts)} parts"
    return Source(
        name=ask.source,
        said=f"read as: {kind}{names}, columns {columns}{said_of_splits(parts)}{said_of_bases(plans, ask)} "
        "(override with columns.image=... columns.caption=... columns.label=... format=...)",
        rows=partial(table_rows, parts, plans, read, partial(Watch, ask.columns, columns, raws, ask.source, captioned)),
        table="" if len(parts) > 1 else f"{parts[0].path.name} {item}",
        columns=str(columns),
        limit=None if ask.root is not None else os.path.commonpath([plan.base.limit for plan in plans]),
        hints=hints(plans[0].base, ask.root),
    )


def said_of_splits(parts: list[Part]) -> str:
    splits = ordered({part.split for part in parts if part.split})
    return f", splits {' '.join(splits)} by name" if splits else ""


def said_of_bases(plans: list[Plan], ask: Ask) -> str:
    """Where the images were found, if not beside the table."""
    found = [plan.base.start for plan in plans if plan.base.start != plan.base.table and ask.root is None]
    return f", images in {' '.join(dict.fromkeys(found))}" if found else ""


def hints(base: Base, root: str | None) -> dict[str, str]:
    return {
        "image_missing": f"paths start from {base.start}" + (", root=FOLDER names another" if root is None else ""),
        "image_outside_source": f"no path may leave {base.limit}"
        + (" and no link lead out of it; root=FOLDER names a wider one and allows links" if root is None else ""),
        "image_url": "img2dataset downloads images; give it the rows with addresses",
    }


def table_rows(
    parts: list[Part], plans: list[Plan], read: Read, watch_from: Callable[[], Watch]
) -> Iterator[Row | Bad]:
    watch = watch_from()
    for part, plan in zip(parts, plans, strict=True):
        for raw in read(part.path):
            if plan.several and isinstance(raw.where, int):
                raw.where = f"{part.path.parent.name}/{part.path.name} {plan.item} {raw.where}"
            if isinstance(raw, Bad):
                yield raw
            else:
                watch.look(raw)
                yield to_row(raw, plan)
    watch.end()


def to_row(raw: Raw, plan: Plan) -> Row | Bad:
    """The row as the columns say; what nothing can be learnt from is a Bad."""
    columns, values = plan.columns, raw.values
    split = plan.split or (split_name(values.get(columns.split)) if columns.split is not None else None)
    try:
        image, name = raw.image, None
        if image is None:
            image, name = resolve(plan.base, values.get(columns.image or ""))
        captions = [text for column in columns.captions for text in captions_in_cell(values.get(column))]
        captions = [encodable(caption, "strict") for caption in captions or raw.captions]
        captions = [caption for caption in captions if is_visible(caption)]
        label = raw.label
        if label is None and columns.label is not None:
            label = label_in_cell(values.get(columns.label))
        if not captions and label is None:
            raise BadSample("no_caption_or_label")
        return Row([raw.where], image, captions, label, split, columns_json(renamed(values, columns, name), captions))
    except BadSample as bad:
        return Bad(raw.where, bad.reason, split)


def renamed(values: dict[str, Any], columns: Columns, name: str | None) -> dict[str, Any]:
    """The columns beside the captions; image, label and split under these names where no other column has them."""
    known = {columns.image: "image", columns.label: "label", columns.split: "split"}
    taken = values.keys() - known.keys()
    rest = {}
    for column, value in values.items():
        if column in columns.captions or column == "captions":
            continue
        if column == columns.image and name is not None:
            value = name
        new = known.get(column, column)
        rest[column if new in taken else new] = value
    return rest


def split_name(value: Any) -> str | None:
    """The split that a cell or a name says; dev and the like are val, other names stay, blank is none."""
    text = "" if value is None or value != value else str(value).strip().lower()
    return SPLIT_OF.get(text) or re.sub(r"[^a-z0-9_]+", "-", text).strip("-")[:60] or None


def split_in(name: str) -> str | None:
    """The only split that is a word of a file's name ("val-00000-of-00002", "captions_train2017"); else None."""
    words = [re.sub(r"[0-9]+$", "", word) for word in re.split(r"[-_. ]", name.lower())]
    found = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def refuse_urls(ask: Ask, columns: Columns, raws: list[Raw], table: Path, known_as: str) -> None:
    """Raises with the command that downloads the images where the table has addresses in place of them."""
    values = [raw.values.get(columns.image) for raw in raws] if columns.image is not None else []
    urls = [value for value in values if isinstance(value, str) and URL.match(value.strip())]
    if not urls or len(urls) < len(values) / 2:
        return
    folder = os.path.splitext(table)[0] + "-downloaded"
    words = ["img2dataset", "--url_list", shlex.quote(str(table)), "--url_col", shlex.quote(str(columns.image))]
    words += ["--input_format", known_as or "csv"]
    words += ["--caption_col", shlex.quote(columns.captions[0])] if columns.captions else []
    kept = [column for column in (columns.label, columns.split) if column]
    words += ["--save_additional_columns", shlex.quote(json.dumps(kept))] if kept else []
    words += ["--output_format", "webdataset", "--output_folder", shlex.quote(folder)]
    words += ["--image_size", "512", "--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True"]
    raise ValueError(
        f"source={ask.source!r}: column {columns.image} has addresses ({urls[0].strip()[:80]}), and packing reads "
        "files. Download the images first, then pack what arrives:\n"
        + ("" if known_as else f"write {table.name} as UTF-8 with commas and a header, which img2dataset reads\n")
        + f"pip install img2dataset\n{' '.join(words)}\nclipft data pack source={shlex.quote(folder)} out=OUT"
    )
