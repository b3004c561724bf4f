"""What every source is read as: rows, each of them an image with captions or a label, or a reason why it is none."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from clipft.config import ColumnsConfig, CsvConfig
from clipft.data.caption import CAPTION_COLUMNS
from clipft.data.sample import BadSample
from clipft.data.sources.place import Place

Where = int | str
"""A line or row of the only table, else a name such as "val.csv line 12", "cat/1.jpg" or "00000/000000012"."""


@dataclass(frozen=True)
class Ask:
    """What the user says about a source; all but its name may be left to looking."""

    source: str
    format: str | None = None
    root: str | None = None
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    csv: CsvConfig = field(default_factory=CsvConfig)


@dataclass(slots=True)
class Raw:
    """A row as its table holds it; what is not in columns stands beside them."""

    where: Where
    values: dict[str, Any]
    image: Place | None = None
    captions: list[str] = field(default_factory=list)
    """Used where the columns have none."""
    label: str | None = None


@dataclass(slots=True)
class Bad:
    """A row that cannot be used."""

    where: Where
    reason: str
    split: str | None = None


@dataclass(slots=True)
class Row:
    """An image with captions, a label, or both, as light as it can be: a table may have millions."""

    where: list[Where]
    """All rows of the table that were joined into this one."""
    image: Place
    captions: list[str]
    label: str | None
    split: str | None
    rest: str
    """All other columns, as JSON."""
    key: str = ""
    """In the packed set; numbered when all rows are known."""


@dataclass(frozen=True)
class Source:
    """A source as it was recognised; nothing but the head of it is read yet."""

    name: str
    said: str
    """How it is read, in one line."""
    rows: Callable[[], Iterator[Row | Bad]]
    table: str = ""
    """What a number in `where` counts, such as "metadata.jsonl line"; empty where rows have names."""
    columns: str = ""
    """Which of the table's columns are read, by role."""
    limit: str | None = None
    """Folder that links must not lead out of; None: the user vouches for them with root=."""
    hints: dict[str, str] = field(default_factory=dict)
    """Reason -> what to do about it."""
    notes: list[str] = field(default_factory=list)
    """What was seen and not read, in sentences."""


def columns_json(values: dict[str, Any], captions: list[str]) -> str:
    """The columns beside the captions as JSON; BadSample where they hold what no JSON text can.

    A column that would be taken for the captions does not come along where there are none.
    """
    if not captions:
        values = {name: value for name, value in values.items() if name not in CAPTION_COLUMNS}
    text = json.dumps(values, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates from JSON escapes
        raise BadSample("bad_utf8") from error
    return text


def text_members(values: dict[str, Any], captions: list[str]) -> dict[str, bytes]:
    """json with the captions and all other columns; txt with a caption per line."""
    if not captions:
        return {"json": json.dumps(values, ensure_ascii=False).encode()}
    return {
        "json": json.dumps({"captions": captions, **values}, ensure_ascii=False).encode(),
        "txt": "".join(" ".join(caption.split()) + "\n" for caption in captions).encode(),
    }
