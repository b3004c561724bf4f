"""What was seen of all items -> columns of numbers, groups of equal and of similar ones, and flags. Pure numpy."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int64

from clipft.data.alike import Pairs, components, near_images
from clipft.data.caption import MOST_CHARS, caption_id, hash_id
from clipft.data.check.items import Item
from clipft.data.check.look import Seen
from clipft.data.names import ordered

FLAT = 4 / 255  # of `contrast`: no more than the noise of a JPEG
DARK = 0.25  # of `light`: no photo of Flickr8k is as dark; little can be made out on the darkest (0.27)
# Of `sharpness`: no photo of Flickr8k (160 pixels) is below, the least sharp has 0.011; blurred with a Gaussian of
# 3 pixels, more than 95 of 100 are.
BLURRED = 0.01
ODD_ASPECT = 3.0  # longer side per shorter side: the square that is cut out shows a third
TINY_FRAC = 0.25  # of the model's image size: less than a sixteenth of its pixels
SCRIPTS = {"CJK": "Han", "FULLWIDTH": "Latin"}  # first words of Unicode's names that are no script's own
SCRIPTS |= {
    name: name.title()
    for name in (
        *("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "HIRAGANA", "KATAKANA", "HANGUL", "DEVANAGARI", "THAI"),
        *("BENGALI", "TAMIL", "TELUGU", "GEORGIAN", "ARMENIAN", "ETHIOPIC", "KHMER", "LAO", "MYANMAR", "GUJARATI"),
    )
}
NO_SCRIPT = "no letters"


@dataclass(eq=False)
class Rows:
    """A row per item; captions have columns of their own, all behind each other in the order of `seen`."""

    items: list[Item]
    seen: Seen
    splits: list[str]
    split: Int64[np.ndarray, " rows"]
    """Place in `splits`."""
    usable: Bool[np.ndarray, " rows"]
    same: Int64[np.ndarray, " rows"]
    """The first row with the same image bytes; of an unusable row itself."""
    alike: Int64[np.ndarray, " rows"]
    """The first row that is connected with it by pictures that are the same or look the same."""
    near: Pairs
    """Pairs of rows, each the first of its bytes, that look the same."""
    owner: Int64[np.ndarray, " captions"]
    """Row of each caption."""
    caption: Int64[np.ndarray, " captions"]
    """Equal for captions that are equal but for case and spaces."""
    loose: Int64[np.ndarray, " captions"]
    """Equal for captions that are also equal but for punctuation."""
    tokens: Int64[np.ndarray, " captions"]
    script: list[str]
    """Of each caption the one that most of its letters belong to."""

    def of(self, split: str) -> Bool[np.ndarray, " rows"]:
        return self.split == self.splits.index(split)


def build_rows(items: list[Item], seen: Seen) -> Rows:
    splits = ordered({item.split for item in items})
    usable = np.array([not reason for reason in seen.reasons], bool)
    same, near = same_images(seen.looks, usable), near_images(seen.looks, usable)
    firsts = np.stack([np.arange(len(items)), same], axis=1)
    texts = [caption for captions in seen.captions for caption in captions]
    return Rows(
        items=items,
        seen=seen,
        splits=splits,
        split=np.array([splits.index(item.split) for item in items], np.int64),
        usable=usable,
        same=same,
        alike=components(len(items), np.concatenate([firsts, near])),
        near=near,
        owner=np.repeat(np.arange(len(items)), [len(captions) for captions in seen.captions]).astype(np.int64),
        caption=np.array([caption_id(text) for text in texts], np.int64),
        loose=np.array([loose_id(text) for text in texts], np.int64),
        tokens=np.array([number for numbers in seen.tokens for number in numbers], np.int64),
        script=[script_of(text) for text in texts],
    )


def same_images(looks: np.ndarray, usable: Bool[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """For each row the first usable one with the same bytes, for an unusable one itself."""
    found = np.flatnonzero(usable)
    label = np.arange(len(looks))
    _, first, place = np.unique(looks["digest"][found], return_index=True, return_inverse=True)
    label[found] = found[first[place]]
    return label


def flags_of(rows: Rows, image_size: int, context_length: int) -> dict[str, Bool[np.ndarray, " rows"]]:
    """What is odd about each row; several may hold, none of them for a row that cannot be used."""
    looks, index = rows.seen.looks, np.arange(len(rows.items))
    shorter, longer = np.minimum(looks["height"], looks["width"]), np.maximum(looks["height"], looks["width"])
    flat = looks["contrast"] < FLAT
    flags = {
        "duplicate": rows.same != index,
        "near_duplicate": (rows.alike != index) & (rows.same == index),
        "dark": ~flat & (looks["light"] < DARK),
        "flat": flat,
        "blurred": ~flat & (looks["sharpness"] < BLURRED),
        "tiny": shorter < TINY_FRAC * image_size,
        "odd_aspect": longer > ODD_ASPECT * shorter,
        "cut_caption": np.isin(index, rows.owner[is_cut(rows, context_length)]),
    }
    return {name: flag & rows.usable for name, flag in flags.items()}


def is_cut(rows: Rows, context_length: int) -> Bool[np.ndarray, " captions"]:
    """Which captions have more tokens than the model reads."""
    return rows.tokens > context_length


def leaks(rows: Rows, first: str, second: str) -> tuple[dict[int, int], dict[int, int]]:
    """Rows of the second split with a row of the first one that has the same image, and with one that looks the same
    where none has the same."""
    there, here = np.flatnonzero(rows.of(first) & rows.usable), np.flatnonzero(rows.of(second) & rows.usable)
    example = dict(zip(rows.same[there][::-1].tolist(), there[::-1].tolist(), strict=True))
    neighbour: dict[int, int] = {}
    for a, b in rows.near.tolist():
        for one, other in ((a, b), (b, a)):
            if other in example:
                neighbour.setdefault(one, example[other])
    groups = dict(zip(here.tolist(), rows.same[here].tolist(), strict=True))
    equal = {i: example[group] for i, group in groups.items() if group in example}
    alike = {i: neighbour[group] for i, group in groups.items() if i not in equal and group in neighbour}
    return equal, alike


def loose_id(text: str) -> int:
    """hash_id of the words alone, in lower case, without punctuation."""
    words = re.sub(r"[\W_]+", " ", text.casefold()).strip()
    return hash_id(words.encode()) if words else caption_id(text)


def script_of(text: str) -> str:
    """The script that most letters of the text belong to."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else NO_SCRIPT
    found = Counter(script_of_letter(char) for char in text[:MOST_CHARS] if char.isalpha())
    return found.most_common(1)[0][0] if found else NO_SCRIPT


@lru_cache(100_000)
def script_of_letter(letter: str) -> str:
    return SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], "other")
