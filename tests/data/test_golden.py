"""Pixels against what the file formats say they are, within 2 of 255; the files are written without Pillow."""

import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from pictures import png, tiff
from PIL import Image

from clipft.data.decode import decode_rgb
from clipft.data.sample import BadSample

SHAPE = (12, 10)
RNG = np.random.default_rng(0)


def check(raw: bytes, expected: np.ndarray) -> None:
    """Compares with RGB of 0..1, or with RGB and alpha over white."""
    colour, alpha = expected[..., :3], expected[..., 3:] if expected.shape[2] == 4 else 1.0
    white = 255 * (alpha * colour + 1 - alpha)
    assert np.abs(decode_rgb(raw, 1_000_000) - white).max() < 2.001


def draw(top: int, channels: int) -> np.ndarray:
    return RNG.integers(0, top + 1, (*SHAPE, channels))


def grey(values: np.ndarray) -> np.ndarray:
    """Grey or grey with alpha as RGB or RGBA."""
    return np.concatenate([values[..., :1].repeat(3, axis=2), values[..., 1:]], axis=2)


def hole(colour: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The colours with alpha 0 in some places."""
    return np.concatenate([colour, 1.0 - where[..., None]], axis=2)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_every_depth(depth: int):
    values, top = draw(2**depth - 1, 1), 2**depth - 1
    check(png(values, depth, 0), grey(values / top))
    key = int(values[0, 0, 0])
    see_through = hole(grey(values / top), values[..., 0] == key)
    check(png(values, depth, 0, (b"tRNS", struct.pack(">H", key))), see_through)


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_and_alpha_pngs_of_both_depths(depth: int):
    top = 2**depth - 1
    colour, with_alpha, grey_alpha = draw(top, 3), draw(top, 4), draw(top, 2)
    check(png(colour, depth, 2), colour / top)
    check(png(with_alpha, depth, 6), with_alpha / top)
    check(png(grey_alpha, depth, 4), grey(grey_alpha / top))
    key = colour[0, 0]
    see_through = hole(colour / top, (colour == key).all(axis=2))
    check(png(colour, depth, 2, (b"tRNS", struct.pack(">3H", *key.tolist()))), see_through)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_pngs_of_every_depth(depth: int):
    size = 2**depth
    palette, index = RNG.integers(0, 256, (size, 4)), draw(size - 1, 1)
    colours = (b"PLTE", palette[:, :3].astype(np.uint8).tobytes())
    shown = palette[index[..., 0]] / 255
    check(png(index, depth, 3, colours), shown[..., :3])
    check(png(index, depth, 3, colours, (b"tRNS", palette[:, 3].astype(np.uint8).tobytes())), shown)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_sixteen_bits(order: str):
    for channels, tags in [
        (1, {262: [1]}),
        (3, {262: [2]}),
        (4, {262: [2], 338: [2]}),
    ]:
        values = draw(65535, channels)
        raw = tiff(
            10, 12, values.astype(f"{order}u2").tobytes(), {258: [16] * channels, 277: [channels], **tags}, order
        )
        check(raw, grey(values / 65535) if channels == 1 else values / 65535)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_floats(order: str):
    values = RNG.random((*SHAPE, 1))
    for photometric, shown in ((1, values), (0, 1 - values)):
        tags = {258: [32], 262: [photometric], 277: [1], 339: [3]}
        check(tiff(10, 12, values.astype(f"{order}f4").tobytes(), tags, order), grey(shown))


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_tiffs_whose_zero_is_white(bits: int):
    values = draw(2**bits - 1, 1)
    rows = np.packbits(values[..., 0], axis=1) if bits == 1 else values.astype(f"<u{bits // 8}")
    check(tiff(10, 12, rows.tobytes(), {258: [bits], 262: [0], 277: [1]}), grey(1 - values / (2**bits - 1)))


def test_tiffs_whose_numbers_mean_nothing_that_is_agreed_are_dropped():
    for kind, code in (("<i2", 2), ("<u4", 1)):
        values = np.full(SHAPE, -5 if code == 2 else 2**31).astype(kind)
        raw = tiff(10, 12, values.tobytes(), {258: [8 * values.itemsize], 262: [1], 277: [1], 339: [code]})
        with pytest.raises(BadSample, match="image_range"):
            decode_rgb(raw, 1_000_000)


def patches(channels: int) -> np.ndarray:
    """Single-coloured squares of 8 x 8, which a lossy format of the best quality keeps within 1 of 255."""
    colours = np.random.default_rng(1).integers(0, 256, (6, 8, channels), np.uint8)
    return colours.repeat(8, axis=0).repeat(8, axis=1)


def encode(pixels: np.ndarray, kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    if mode:
        image = Image.frombytes(mode, image.size, pixels.tobytes())
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_jpegs_of_three_channels_and_of_one(options: dict[str, Any]):
    check(encode(patches(3), "JPEG", quality=100, subsampling=0, **options), patches(3) / 255)
    check(encode(patches(1)[..., 0], "JPEG", quality=100, **options), grey(patches(1) / 255))


def inks_to_rgb(inks: np.ndarray) -> np.ndarray:
    """Cyan, magenta, yellow and black take away light one after the other."""
    return (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)


def test_cmyk_jpegs_hold_inverted_inks_as_adobe_writes_them():
    raw = encode(patches(4), "JPEG", "CMYK", quality=100, subsampling=0)
    assert b"Adobe\0d\0\0\0\0\0" in raw
    check(raw, inks_to_rgb(patches(4).astype(float)))


def test_ycck_jpegs_hold_inks_as_luma_and_chroma():
    inks = patches(4).astype(float)
    c, m, y = inks[..., 0], inks[..., 1], inks[..., 2]
    # JFIF's conversion; Adobe takes it over the inks, and stores black inverted beside it.
    luma = 0.299 * c + 0.587 * m + 0.114 * y
    stored = [luma, 128 + (y - luma) / 1.772, 128 + (c - luma) / 1.402, 255 - inks[..., 3]]
    # Pillow inverts what it writes as CMYK; the flag behind "Adobe" then says that it is YCCK.
    planes = 255 - np.rint(np.stack(stored, axis=2)).astype(np.uint8)
    raw = encode(planes, "JPEG", "CMYK", quality=100, subsampling=0)
    raw = raw.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
    check(raw, inks_to_rgb(inks))


def test_webp_lossless_and_lossy_with_and_without_alpha():
    check(encode(patches(3), "WEBP", lossless=True), patches(3) / 255)
    check(encode(patches(4), "WEBP", lossless=True, exact=True), patches(4) / 255)
    plain = patches(1).repeat(3, axis=2)  # without colour, which is stored at half the resolution
    check(encode(plain, "WEBP", quality=100), plain / 255)
    alpha = np.concatenate([plain, patches(4)[..., 3:]], axis=2)
    check(encode(alpha, "WEBP", quality=100, alpha_quality=100, exact=True), alpha / 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_shown(kind: str):
    frames = [np.full((10, 12, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0][3:5, 4:9] = 120, 130, 140
    more = [Image.fromarray(frame) for frame in frames[1:]]
    options: dict[str, Any] = {"save_all": True, "append_images": more} | ({"lossless": True} if kind == "WEBP" else {})
    check(encode(frames[0], kind, **options), frames[0] / 255)


# Where the first row and the first column of the file lie in the picture (EXIF 2.32, table 6).
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_first_row_and_column_lie_where_exif_says(orientation: int):
    stored = np.full((48, 64, 3), 128, np.uint8)
    stored[:8], stored[:, :8], stored[:8, :8] = 255, 0, 60
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_rgb(encode(stored, "JPEG", quality=100, subsampling=0, exif=exif.tobytes()), 1_000_000)
    sides = {"top": pixels[0], "bottom": pixels[-1], "left": pixels[:, 0], "right": pixels[:, -1]}
    row, column = ORIENTATIONS[orientation]
    assert pixels.shape == ((48, 64, 3) if row in ("top", "bottom") else (64, 48, 3))
    assert np.median(sides[row]) >= 253 and np.median(sides[column]) <= 2
    assert all(abs(np.median(side) - 128) <= 2 for name, side in sides.items() if name not in (row, column))
