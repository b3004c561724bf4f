"""What Pillow does not look at in a PNG: checksums of the pixels, rows that are missing, the depth of a colour."""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

from clipft.data.sample import BadSample

HEADER = struct.Struct(">IIBBBBB")  # width, height, depth, colour type, compression, filter, interlace (PNG, 11.2.2)
HEADER_AT, FIRST_CHUNK = 16, 8
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type (PNG, table 11.1)
# First column and row, and steps between columns and rows, of the passes of an interlaced picture (PNG, 8.2).
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
AT_ONCE = 1 << 16


def pixel_chunks(raw: bytes) -> Iterator[tuple[int, int]]:
    """First byte and end of each IDAT chunk's content, which may lie behind the end of the file."""
    place = FIRST_CHUNK
    while place + 8 <= len(raw) and (kind := raw[place + 4 : place + 8]) != b"IEND":
        end = place + 8 + int.from_bytes(raw[place : place + 4], "big")
        if kind == b"IDAT":
            yield place + 8, end
        place = end + 4


def check_sums(raw: bytes) -> None:
    """BadSample where pixels are not those that were written; Pillow checks the other chunks."""
    view = memoryview(raw)
    for start, end in pixel_chunks(raw):
        stored = raw[end : end + 4]
        if len(stored) == 4 and zlib.crc32(view[start - 4 : end]) != int.from_bytes(stored, "big"):
            raise BadSample("image_damaged")


def check_rows(raw: bytes, image: Image.Image) -> None:
    """BadSample where the pixels end before the last row does: Pillow leaves the rest of the picture at zero."""
    width, height, depth, colour, _, _, interlaced = HEADER.unpack_from(raw, HEADER_AT)
    if not interlaced and image.crop((0, height - 1, width, height)).getbbox(alpha_only=False):
        return
    sizes = [(width, height)]
    if interlaced:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in PASSES]
    bits = CHANNELS[colour] * depth
    wanted = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    if num_inflated(raw, wanted) < wanted:
        raise BadSample("image_damaged")


def num_inflated(raw: bytes, enough: int) -> int:
    """How many bytes the pixels inflate to, counted up to `enough`."""
    inflater, found, view = zlib.decompressobj(), 0, memoryview(raw)
    for start, end in pixel_chunks(raw):
        left = view[start:end]
        while len(left) and not inflater.eof and found < enough:
            found += len(inflater.decompress(left, AT_ONCE))
            left = inflater.unconsumed_tail
    while not inflater.eof and found < enough and (more := len(inflater.flush(AT_ONCE))):
        found += more
    return found


def make_transparent(raw: bytes, image: Image.Image) -> None:
    """Brings the colour that a PNG names transparent to the 8 bits that Pillow has scaled the pixels to."""
    depth, colour = raw[HEADER_AT + 8], image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(colour, tuple):
        del image.info["transparency"]
        whole = np.asarray(image).astype(np.uint16) << 8 | low_bytes(raw)
        image.putalpha(Image.fromarray((whole != colour).any(axis=2)))


def low_bytes(raw: bytes) -> np.ndarray:
    """The lower bytes of RGB pixels of 16 bits, where Pillow keeps the higher ones."""
    with Image.open(BytesIO(raw), formats=["PNG"]) as image:
        # As if the lower ones came first.
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
        return np.asarray(image)
