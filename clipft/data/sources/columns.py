"""Which columns of a table hold the image, the captions, the label and the split; by name, else by looking."""

import ast
import difflib
import json
import re
import shlex
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from clipft.config import ColumnsConfig
from clipft.data.caption import caption_list
from clipft.data.sample import IMAGE_KINDS, BadSample
from clipft.data.sources.row import Raw

IMAGES = ("image", "img", "image_path", "img_path", "filepath", "file_path", "path", "file_name", "filename")
IMAGES += ("image_file", "image_name", "image_filename", "imagepath", "file")
CAPTIONS = ("captions", "caption", "text", "texts", "title", "sentence", "sentences", "description", "comment")
LABEL, OTHER_LABELS = "label", ("class", "class_name", "classname", "category", "label_name", "target")
SPLITS = ("split", "subset", "partition")
# caption_0, caption_1, ...: one column for each of an image's captions
NUMBERED = re.compile(r"(caption|text|title|sentence)s?_?[0-9]+")
IMAGE_NAME = re.compile(rf"\.({'|'.join(IMAGE_KINDS)})(#[0-9]+)?$", re.IGNORECASE)
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# What careless programs write for a caption that is missing.
NULLS = frozenset(("nan", "NaN", "None", "null", "NULL", "<NA>"))


@dataclass(frozen=True)
class Columns:
    """The columns to read; image is None where the source itself knows where the images are."""

    image: str | None
    captions: tuple[str, ...]
    label: str | None
    split: str | None

    def __str__(self) -> str:
        named = {"image": self.image, "caption": ",".join(self.captions), "label": self.label, "split": self.split}
        return " ".join(f"{role}={name}" for role, name in named.items() if name) or "none"


def choose(given: ColumnsConfig, head: list[Raw], name: str, captioned: bool = False, whole: bool = True) -> Columns:
    """The columns that the user gave, and for the others the only ones that fit the first rows.

    Two that fit equally well raise, with what decides between them. `captioned`: captions also come from elsewhere.
    `whole`: there are no other rows, in which a column that the user gave may be.
    """
    values = column_values(head)
    if whole:
        for role, column in absent(given, values):
            raise no_column(role, column, values, name)
    image = given.image
    if image is None and not any(raw.image is not None for raw in head):
        image = find_image(values, name)
    taken = {image, given.label, given.split}
    captions = tuple(given.caption or find_captions(head, [c for c in values if c not in taken], name))
    captions = () if captions == ("none",) else captions
    taken |= set(captions)
    free = {column: found for column, found in values.items() if column not in taken}
    label = given.label or find_label(free, name, captioned or bool(captions))
    split = given.split or only("split", [c for c in values if plain(c) in SPLITS and c not in taken], name)
    if not captions and not captioned and label in (None, "none"):
        others = [column for column in values if column not in (image, split)]
        if len(others) != 1 or given.caption or given.label:
            raise ValueError(
                f"source={name!r}: no column is known to hold captions or labels. Name one of them: "
                f"{' or '.join(f'columns.caption={shlex.quote(c)}' for c in others[:4]) or 'columns.caption=COLUMN'}, "
                f"or columns.label=COLUMN. Columns: {', '.join(values)}."
            )
        captions = (others[0],)
    return Columns(image, captions, *(None if column == "none" else column for column in (label, split)))


def column_values(head: list[Raw]) -> dict[str, list[Any]]:
    """The values of each column in the first rows, without those that hold nothing."""
    values: dict[str, list[Any]] = {}
    for raw in head:
        for column, value in raw.values.items():
            values.setdefault(column, [])
            if value is not None and value != "" and value == value:
                values[column].append(value)
    return values


def absent(given: ColumnsConfig, values: Collection[str]) -> list[tuple[str, str]]:
    """Role and name of the columns that the user gave and that are not there."""
    roles = {"image": [given.image], "caption": given.caption or [], "label": [given.label], "split": [given.split]}
    pairs = [(role, column) for role, columns in roles.items() for column in columns if column is not None]
    return [(role, c) for role, c in pairs if c not in values and (c != "none" or role == "image") and values]


def no_column(role: str, column: str, values: Iterable[str], name: str) -> ValueError:
    near = difflib.get_close_matches(column, list(values), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return ValueError(f"columns.{role}={column!r} is no column of source={name!r}.{hint} Columns: {', '.join(values)}.")


class Watch:
    """Looks at the rows behind the first ones, by which the columns were chosen: another choice may come too late.

    Rows may have columns of their own, or the first value in one: a split that only the last thousand rows name must
    not be overlooked.
    """

    def __init__(self, given: ColumnsConfig, columns: Columns, head: list[Raw], name: str, captioned: bool):
        self.given, self.name, self.captioned = given, name, captioned or bool(columns.captions)
        values = column_values(head)
        self.columns = list(values)
        self.missing = absent(given, values)
        self.known = {column for column, found in values.items() if found}
        self.known |= {columns.split, columns.label, columns.image, *columns.captions} - {None}

    def look(self, raw: Raw) -> None:
        """Raises where the row has a value in a column that would have had a say."""
        if self.missing:
            self.missing = [(role, column) for role, column in self.missing if column not in raw.values]
        if raw.values.keys() <= self.known:
            return
        for column, value in raw.values.items():
            if column in self.known:
                continue
            role = self.role(column, raw)
            if role is None:
                self.known.add(column)
            elif value is not None and value != "" and value == value:
                choice = f"columns.{role}={shlex.quote(column)}, or another{' or none' if role != 'image' else ''}"
                raise ValueError(
                    f"source={self.name!r}: column {column} has its first value in {raw.where}, behind the first rows, "
                    f"by which columns are chosen. Say whether it is the {role}: {choice}."
                )

    def role(self, column: str, raw: Raw) -> str | None:
        """What a column is by its name, where the user has left that to looking."""
        bare = plain(column)
        if bare in IMAGES and raw.image is None and self.given.image is None:
            return "image"
        if (bare in CAPTIONS or NUMBERED.fullmatch(bare)) and self.given.caption is None:
            return "caption"
        if bare in ((LABEL,) if self.captioned else (LABEL, *OTHER_LABELS)) and self.given.label is None:
            return "label"
        return "split" if bare in SPLITS and self.given.split is None else None

    def end(self) -> None:
        """Raises where no row had a column that the user gave."""
        for role, column in self.missing:
            raise no_column(role, column, self.columns, self.name)


def plain(column: str) -> str:
    """The column's name as names are compared."""
    return re.sub(r"[\s-]+", "_", column.strip().casefold())


def only(role: str, candidates: list[str], name: str) -> str | None:
    """The single candidate, None where there is none; several raise."""
    if len(candidates) > 1:
        raise ValueError(
            f"source={name!r}: columns {' and '.join(candidates)} could both be the {role}. "
            f"Decide: {' or '.join(f'columns.{role}={shlex.quote(column)}' for column in candidates)}."
        )
    return candidates[0] if candidates else None


def find_image(values: dict[str, list[Any]], name: str) -> str:
    """The column with images: of those with a known name the one that looks like it, else any that looks like it."""
    named = [column for column in values if plain(column) in IMAGES and values[column]]
    looking = [column for column in named if all_are(values[column], looks_like_image)]
    anywhere = [column for column in values if all_are(values[column], looks_like_image)]
    found = only("image", looking or named or anywhere, name)
    if found is None:
        raise ValueError(
            f"source={name!r} has no column for the image. Expected one of {', '.join(IMAGES[:8])}, or one with "
            f"names of image files, or columns.image=COLUMN; found {', '.join(values) or 'no column'}."
        )
    return found


def looks_like_image(value: Any) -> bool:
    return isinstance(value, str) and bool(IMAGE_NAME.search(value.strip()) or URL.match(value.strip()))


def all_are(values: Iterable[Any], test: Callable[[Any], bool]) -> bool:
    """Whether there are values and nine tenths of them pass: a table may have bad rows."""
    passed = [test(value) for value in values]
    return bool(passed) and sum(passed) >= 0.9 * len(passed)


def find_captions(head: list[Raw], columns: list[str], name: str) -> list[str]:
    """The column with captions, all numbered ones, or several of which no row uses more than one."""
    numbered = [column for column in columns if NUMBERED.fullmatch(plain(column))]
    known = [column for column in columns if plain(column) in CAPTIONS]
    used = [[column for column in known if captions_in_cell(raw.values.get(column))] for raw in head]
    named = [column for column in known if any(column in each for each in used)]
    if named and numbered:
        only("caption", [*named, f"[{','.join(numbered)}]"], name)
    if any(len(each) > 1 for each in used):
        only("caption", named, name)
    return named or numbered


def find_label(values: dict[str, list[Any]], name: str, captioned: bool) -> str | None:
    """The column called label; other names count only where there are no captions, whose companions they often are."""
    known = (LABEL,) if captioned else (LABEL, *OTHER_LABELS)
    return only("label", [column for column in values if plain(column) in known and values[column]], name)


def captions_in_cell(value: Any) -> list[str]:
    """The captions of a cell: a text, a list of texts, or such a list written out as text."""
    if isinstance(value, str):
        if value.strip() in NULLS:
            return []
        if value.lstrip().startswith("[") and value.rstrip().endswith("]"):
            return caption_list(list_in(value) or value)
    return caption_list(value)


def list_in(text: str) -> list[str] | None:
    """The list of texts that a cell spells in JSON or as Python prints it; None where it spells something else."""
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in what may be no Python at all
                found = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
    return None


def label_in_cell(value: Any) -> str | None:
    if value is not None and value == value and not isinstance(value, str | int):
        raise BadSample("bad_label")
    return None if value is None or value != value else " ".join(str(value).split()) or None
