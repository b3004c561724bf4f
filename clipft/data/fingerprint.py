"""An image's bytes -> can it be used, which bytes are these, and what does it look like."""

import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clipft.data.decode import EXTENSIONS, decode_pillow, image_extension
from clipft.data.sample import BadSample
from clipft.data.sources.paths import leads_out
from clipft.data.sources.place import Place, read_place

REASONS = ("image_missing", "image_unreadable", "image_outside_source", "image_empty", "image_header_damaged")
REASONS += ("format_not_allowed", "too_large", "no_image", "read_error", "short_read", "shard_changed")
KINDS = tuple(dict.fromkeys(EXTENSIONS.values()))
MOST_PIXELS = 178_956_970  # above it Pillow warns of a decompression bomb
SIDE = 64  # px a JPEG is decoded to at least: the hash sees 9 x 8
LEAST_STD = 4.0  # of grey values: below it the hash of a flat picture is noise (EuroSAT's lakes all look the same)

SEEN = np.dtype(
    [
        ("reason", np.uint8),  # 0: none, else its place in REASONS from 1 on
        ("kind", np.uint8),  # place in KINDS
        ("digest", np.uint64),  # of the bytes
        ("hashed", np.bool_),  # whether the next two mean anything
        ("hash", np.uint64, 2),
        ("colours", np.uint8, 48),
    ]
)
"""What is known of an image: 75 bytes of it."""


def look_at_images(places: Sequence[Place], limit: str | None, deep: bool) -> np.ndarray:
    """A record of type SEEN for each image; not `deep`, only reason and kind, from the header alone.

    `limit` is the folder that links must not lead out of.
    """
    return np.array([look_at_image(place, limit, deep) for place in places], SEEN)


def look_at_image(place: Place, limit: str | None, deep: bool) -> Any:
    seen = np.zeros((), SEEN)
    try:
        refuse_path(place, limit)
        if isinstance(place, str) and not deep:
            with open(place, "rb") as file:
                seen["kind"] = KINDS.index(image_extension(file))
            return seen[()]
        raw = read_place(place)
        seen["kind"] = KINDS.index(image_extension(BytesIO(raw)))
    except BadSample as bad:
        seen["reason"] = 1 + REASONS.index(bad.reason)
    except OSError:
        seen["reason"] = 1 + REASONS.index("image_unreadable")
    else:
        if deep:
            seen["digest"] = image_digest(raw)
            fill_looks(seen, raw)
    return seen[()]


def refuse_path(place: Place, limit: str | None) -> None:
    """BadSample for a path that leads to no plain file, or over a link out of the folder `limit`."""
    if not isinstance(place, str):
        return
    if limit is not None and os.path.lexists(place) and leads_out(place, limit):
        raise BadSample("image_outside_source")
    if not is_file(place):  # opening a pipe would wait for its writer
        raise BadSample("image_missing")


def is_file(path: str) -> bool:
    """Whether there is a plain file; OSError where that cannot be known."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def fill_looks(seen: np.ndarray, raw: bytes) -> None:
    """Adds what the picture looks like, where it can be decoded and is more than one flat colour."""
    with suppress(BadSample):
        put_looks(seen, decode_pillow(raw, MOST_PIXELS, SIDE))


def image_digest(raw: bytes) -> int:
    """What equal bytes share, for the column `digest`."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def put_looks(seen: np.ndarray | np.void, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
    """Fills the columns hashed, hash and colours, unless the picture is one flat colour."""
    bits, colours, std = looks_of(pixels)
    if std >= LEAST_STD:
        seen["hashed"], seen["hash"], seen["colours"] = True, np.packbits(bits).view(np.uint64), colours


def looks_of(pixels: UInt8[np.ndarray, "H W 3"]) -> tuple[np.ndarray, np.ndarray, float]:
    """128 bits: does grey rise to the right, and downwards, between the cells of a grid of 9 x 8 and of 8 x 9
    (the difference hash of N. Krawetz, http://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html);
    the mean colours of 4 x 4 cells; the standard deviation of the grey values."""
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    wide = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    high = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (high[1:] > high[:-1]).ravel()])
    return bits, np.asarray(image.resize((4, 4), Image.Resampling.BOX)).ravel(), float(wide.std())
