"""Members of a sample -> captions, label and group, and the ids by which equal ones are known."""

import hashlib
import html
import json
import re
from typing import Any

from clipft.data.sample import BadSample

CAPTION_COLUMNS = ("captions", "caption", "text", "title")
# 12 characters for each of the 77 tokens that CLIP reads; English has about 5. open_clip's tokenizer would go through
# a megabyte whole before it keeps the first 77 tokens.
MOST_CHARS = 924
# Its time also grows with the square of the letters, or of the signs, that stand together; no word has so many.
RUN = re.compile(r"([^\W\d_]{128}|(?:[^\w\s]|_){64})(?=\S)")
# Names that open_clip's tokenizer takes for its start and end tokens wherever they stand in a text.
SPECIAL = re.compile(r"<(start_of_text|end_of_text)>", re.IGNORECASE)
# In printable ASCII text: entities, or s or e behind the bracket. Other text may be cleaned into anything.
MAYBE_SPECIAL = re.compile(r"<[^a-df-rt-z0-9 ]|&[#a-z]", re.IGNORECASE)
TERMINAL_COLOUR = re.compile(r"\x1b\[[\d;]*[a-z]", re.IGNORECASE)  # which open_clip's tokenizer does not see
MOST_CAPTIONS = 1000  # of a sample; more are a file of something else, and cost seconds


def captions_of(members: dict[str, bytes], errors: str = "strict") -> list[str]:
    """The captions of a sample in words, as a tokenizer may see them; never empty."""
    return [only_words(caption) for caption in written_captions(members, errors)]


def written_captions(members: dict[str, bytes], errors: str = "strict") -> list[str]:
    """Captions from `json` where it names any, else the lines of `txt`; never empty. only_words is left to be done.

    `errors` (data.text_errors) is strict, for a BadSample where bytes are not UTF-8, or replace, for U+FFFD there.
    """
    captions = []
    if "json" in members:
        captions = captions_in(parse_json(members["json"], errors))
    if not captions and "txt" in members:
        captions = caption_list(read_utf8(members["txt"], errors).split("\n"))
    if len(captions) > MOST_CAPTIONS:
        raise BadSample("too_many_captions")
    captions = [shortened(encodable(caption, errors)) for caption in captions]
    captions = [caption for caption in captions if is_visible(caption)]
    if not captions:
        raise BadSample("no_caption")
    return captions


def encodable(text: str, errors: str) -> str:
    """The text without lone surrogates, which JSON escapes can make and no tokenizer takes."""
    return text if text.isascii() else read_utf8(text.encode("utf-8", "surrogatepass"), errors)


def shortened(text: str) -> str:
    """As much of the text as can matter to a model, in words that no tokenizer takes long over."""
    if len(text) > MOST_CHARS:
        text = " ".join(text.split())[:MOST_CHARS].rstrip()
    return RUN.sub(r"\1 ", text) if len(text) > 64 else text


def only_words(text: str) -> str:
    """The text with the names of special tokens spelled apart, so that they are read as words.

    They count as open_clip's tokenizer sees them, after it has resolved entities, full-width letters and the like.
    """
    # Cleaning also takes control characters away, and what stood around one then stands together.
    while not (text.isascii() and text.isprintable()) or MAYBE_SPECIAL.search(text):
        from ftfy import fix_text  # which open_clip has imported by then; alone it would slow down the command line

        cleaned = html.unescape(html.unescape(fix_text(text)))
        if not SPECIAL.search(cleaned):
            break
        text = SPECIAL.sub(r"< \1 >", cleaned)
    return text


def is_visible(text: str) -> bool:
    """Whether there is anything but spaces and marks without a shape, also where entities stand for them."""
    text = html.unescape(text)
    if "\x1b" in text:
        text = TERMINAL_COLOUR.sub("", text)
    return any(char.isprintable() and not char.isspace() for char in text)


def question_of(members: dict[str, bytes], labelled: bool, text_errors: str) -> tuple[int, list[str]]:
    """Label (-1: none) and captions of a sample that has one of them; a bad caption leaves the label."""
    label = read_label(members["cls"]) if labelled and "cls" in members else -1
    try:
        return label, captions_of(members, text_errors)
    except BadSample:
        if label < 0:
            raise
        return label, []


def checked_question(members: dict[str, bytes], num_classes: int, text_errors: str) -> tuple[int, list[str]]:
    """question_of a sample in a set of so many classes, 0 where labels are not read; BadSample for a label beyond."""
    label, captions = question_of(members, num_classes > 0, text_errors)
    if label >= num_classes > 0:
        raise BadSample("label_without_class")
    return label, captions


def read_label(raw: bytes) -> int:
    try:
        return max(int(raw), -1)
    except ValueError as error:
        raise BadSample("bad_label") from error


def captions_in(row: Any) -> list[str]:
    """Captions of the first column that has any; nothing but an object has columns."""
    if not isinstance(row, dict):
        return []
    return next((found for column in CAPTION_COLUMNS if (found := caption_list(row.get(column)))), [])


def caption_list(value: Any) -> list[str]:
    """The non-empty strings of a string or list, stripped; null, numbers and objects are no captions."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and (text := item.strip())]


def parse_json(raw: bytes, errors: str = "strict") -> Any:
    text = read_utf8(raw, errors)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json") from error


def read_utf8(raw: bytes, errors: str = "strict") -> str:
    try:
        text = raw.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise BadSample("bad_utf8") from error
    if "\0" in text and errors == "strict":
        raise BadSample("bad_utf8")  # UTF-16 without a mark, or no text at all
    return text.replace("\0", "\ufffd")


def normalise_caption(text: str) -> str:
    """The form in which captions count as equal: case folded, runs of white space as one space."""
    return " ".join(text.casefold().split())


def group_of(members: dict[str, bytes], column: str, errors: str = "strict") -> str | None:
    """The group that this column of `json` names; None for samples without one.

    Blank text and NaN name none: they are what csv files and pandas have in place of a missing value.
    """
    row = parse_json(members["json"], errors) if "json" in members else None
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
