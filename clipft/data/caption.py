"""Members of a sample -> captions and group, and the ids by which equal ones are known."""

import hashlib
import json
from typing import Any

from clipft.data.sample import BadSample

CAPTION_COLUMNS = ("captions", "caption", "text", "title")


def captions_of(members: dict[str, bytes]) -> list[str]:
    """Captions from `json` where it names any, else the lines of `txt`; never empty."""
    captions = []
    if "json" in members:
        captions = captions_in(parse_json(members["json"]))
    if not captions and "txt" in members:
        captions = caption_list(read_utf8(members["txt"]).split("\n"))
    if not captions:
        raise BadSample("no_caption")
    if any("\ud800" <= char <= "\udfff" for caption in captions if not caption.isascii() for char in caption):
        raise BadSample("bad_utf8")  # lone surrogates from JSON escapes: no tokenizer takes them
    return captions


def captions_in(row: Any) -> list[str]:
    """Captions of the first column that has any; nothing but an object has columns."""
    if not isinstance(row, dict):
        return []
    return next((found for column in CAPTION_COLUMNS if (found := caption_list(row.get(column)))), [])


def caption_list(value: Any) -> list[str]:
    """The non-empty strings of a string or list, stripped; null, numbers and objects are no captions."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := item.strip())]


def parse_json(raw: bytes) -> Any:
    text = read_utf8(raw)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json") from error


def read_utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8") from error


def normalise_caption(text: str) -> str:
    """The form in which captions count as equal: case folded, runs of white space as one space."""
    return " ".join(text.casefold().split())


def group_of(members: dict[str, bytes], column: str) -> str | None:
    """The group that this column of `json` names; None for samples without one.

    Blank text and NaN name none: they are what csv files and pandas have in place of a missing value.
    """
    row = parse_json(members["json"]) if "json" in members else None
    value = row.get(column) if isinstance(row, dict) else None
    if isinstance(value, list | dict):
        raise BadSample("bad_group")
    if value is None or value != value:
        return None
    return str(value).strip() or None


def caption_id(text: str) -> int:
    """hash_id of the normalised text."""
    return hash_id(normalise_caption(text).encode())


def group_id(group: str) -> int:
    """hash_id of the group's name, also of one with lone surrogates from JSON escapes."""
    return hash_id(group.encode("utf-8", "surrogatepass"))


def hash_id(raw: bytes) -> int:
    """63-bit hash of these bytes, the same on every machine; fits a signed 64-bit tensor."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1
