"""Members of a sample -> captions, and the key by which equal captions are known."""

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


def caption_id(text: str) -> int:
    """63-bit hash of the normalised text, the same on every machine; fits a signed 64-bit tensor."""
    digest = hashlib.blake2b(normalise_caption(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
