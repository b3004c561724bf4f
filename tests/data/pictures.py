"""Image files written byte by byte after the specifications, so that no image library vouches for itself."""

import struct
import zlib

import numpy as np

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type (PNG, table 11.1)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(
    width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes], interlace: int = 0
) -> bytes:
    """A PNG whose compressed pixels inflate to `rows`, with these chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*each) for each in chunks)


def png(pixels: np.ndarray, depth: int, colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Whole numbers of shape H W C as a PNG of this colour type."""
    height, width, channels = pixels.shape
    assert channels == PNG_CHANNELS[colour]
    rows = b""
    for row in pixels.reshape(height, -1):
        bits = "".join(f"{value:0{depth}b}" for value in row.tolist())
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    return png_file(width, height, depth, colour, rows, *extra)


def tiff(width: int, height: int, content: bytes, tags: dict[int, list[int]], order: str = "<") -> bytes:
    """A TIFF of one strip; `tags` go over the usual ones, and an empty list takes one away."""
    usual = {256: [width], 257: [height], 259: [1], 273: [8], 278: [height], 279: [len(content)]}
    entries = {tag: values for tag, values in sorted((usual | tags).items()) if values}
    start = 8 + len(content) + len(content) % 2
    table, far = b"", b""
    for tag, values in entries.items():
        # Type 4: 32 bits. Tags of several values lie behind the table, those of one in it.
        raw = struct.pack(f"{order}{len(values)}I", *values)
        place = struct.pack(f"{order}I", start + 2 + 12 * len(entries) + 4 + len(far))
        table += struct.pack(f"{order}HHI", tag, 4, len(values)) + (raw if len(raw) == 4 else place)
        far += raw if len(raw) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    body = content + b"\0" * (len(content) % 2) + struct.pack(f"{order}H", len(entries)) + table
    return head + body + bytes(4) + far


def white_fax(side: int) -> bytes:
    """White lines in CCITT group 4, one bit each (T.6: a vertical code for the end of each line)."""
    bits = "1" * side + "000000000001" * 2
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def white_tiff(side: int, tile: int | None = None) -> bytes:
    """A white TIFF of side x side pixels; with `tile`, cut from the corner of one tile of tile x tile pixels."""
    content = white_fax(tile or side)
    tags = {258: [1], 259: [4], 262: [0], 277: [1]}
    if tile is not None:
        tags |= {322: [tile], 323: [tile], 324: [8], 325: [len(content)], 273: [], 278: [], 279: []}
    return tiff(side, side, content, tags)
