import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipft.data.decode import decode_rgb, image_extension
from clipft.data.sample import BadSample

MAX_PIXELS = 1_000_000


def scene(height=48, width=64):
    """A smooth colour picture without symmetry, so that JPEG loses little and every turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 256 // 2], axis=2).astype(np.uint8)


def encode(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(raw):
    with Image.open(BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


def on_white(colour, alpha):
    """The oracle for transparency: a loop over the definition."""
    out = np.zeros((*alpha.shape, 3))
    for y, x in np.ndindex(alpha.shape):
        share = alpha[y, x] / 255
        out[y, x] = share * np.asarray(colour[y, x], float) + (1 - share) * 255
    return out


def assert_close(pixels, expected):
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert np.abs(pixels.astype(float) - expected).max() <= 2


def reason_of(raw, max_pixels=MAX_PIXELS):
    with pytest.raises(BadSample) as error:
        decode_rgb(raw, max_pixels)
    return error.value.reason


RGB = Image.fromarray(scene())
JPEGS = {
    "baseline": encode(RGB, "JPEG", quality=90),
    "full colour resolution": encode(RGB, "JPEG", quality=95, subsampling=0),
    "progressive": encode(RGB, "JPEG", progressive=True),
    "grey": encode(RGB.convert("L"), "JPEG"),
    "cmyk": encode(RGB.convert("CMYK"), "JPEG", quality=95),
    "with bytes behind the end": encode(RGB, "JPEG") + b"trailing",
}
# Adobe's transform flag says whether four channels are CMYK (0) or YCCK (2).
JPEGS["ycck"] = JPEGS["cmyk"].replace(b"Adobe\x00\x64\x00\x00\x00\x00\x00", b"Adobe\x00\x64\x00\x00\x00\x00\x02")


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_decode_as_pillow_decodes_them(name):
    assert_close(decode_rgb(JPEGS[name], MAX_PIXELS), by_pillow(JPEGS[name]))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_lossless_files_give_back_their_pixels(kind, options):
    assert_close(decode_rgb(encode(RGB, kind, **options), MAX_PIXELS), scene())


def test_a_palette_a_grey_and_a_one_bit_png_show_their_colours():
    palette = RGB.quantize(64)
    for image in (palette, RGB.convert("L"), RGB.convert("1")):
        assert_close(decode_rgb(encode(image, "PNG"), MAX_PIXELS), np.asarray(image.convert("RGB")))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        raw = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert_close(decode_rgb(raw, MAX_PIXELS), np.full((10, 20, 3), (255, 0, 0)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_on_white(kind):
    alpha = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    raw = encode(Image.fromarray(np.dstack([scene(), alpha])), kind, **options)
    assert_close(decode_rgb(raw, MAX_PIXELS), on_white(scene(), alpha))


def test_grey_with_alpha_is_laid_on_white():
    grey, alpha = scene()[:, :, 0], scene()[:, :, 1]
    raw = encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG")
    assert_close(decode_rgb(raw, MAX_PIXELS), on_white(grey[:, :, None].repeat(3, axis=2), alpha))


def test_transparent_palette_entries_become_white():
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0, 1, 1, 2, 2])
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    index = np.array([[0, 1, 2, 0], [1, 1, 2, 2]])
    half = on_white(colours[index], np.array([255, 0, 128])[index])
    assert_close(decode_rgb(encode(image, "PNG", transparency=b"\xff\x00\x80"), MAX_PIXELS), half)
    whole = on_white(colours[index], np.array([255, 0, 255])[index])
    assert_close(decode_rgb(encode(image, "PNG", transparency=1), MAX_PIXELS), whole)
    assert_close(decode_rgb(encode(image, "GIF", transparency=1), MAX_PIXELS), whole)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    expected = (deep / 257)[:, :, None].repeat(3, axis=2)
    assert_close(decode_rgb(encode(Image.fromarray(deep), kind), MAX_PIXELS), expected)
    wide = Image.fromarray(deep.astype(np.int32))
    assert_close(decode_rgb(encode(wide, "TIFF"), MAX_PIXELS), expected)


def test_floats_between_zero_and_one_are_scaled_and_others_refused():
    values = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    raw = encode(Image.fromarray(values), "TIFF")
    assert_close(decode_rgb(raw, MAX_PIXELS), (values * 255)[:, :, None].repeat(3, axis=2))
    for wrong in (values * 255, values - 1, values * np.nan):
        assert reason_of(encode(Image.fromarray(wrong), "TIFF")) == "image_range"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_picture_is_turned_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    raw = encode(RGB, kind, exif=exif.tobytes() if kind != "TIFF" else exif, **options)
    with Image.open(BytesIO(raw)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert_close(decode_rgb(raw, MAX_PIXELS), expected)
    turned = np.asarray(RGB.transpose(Image.Transpose.TRANSPOSE)) if orientation >= 5 else scene()
    assert expected.shape == turned.shape


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_is_ignored(exif):
    raw = encode(RGB, "JPEG", exif=exif)
    assert_close(decode_rgb(raw, MAX_PIXELS), by_pillow(encode(RGB, "JPEG")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_dropped_with_a_reason(kind):
    raw = encode(RGB, kind)
    reasons = {reason_of(raw[:length]) for length in range(0, len(raw) * 3 // 4, 97)}
    assert reasons <= {
        "image_truncated",
        "image_damaged",
        "image_header_damaged",
        "format_not_allowed",
        "image_empty",
    }
    if kind == "JPEG":
        assert reason_of(raw[: len(raw) * 3 // 4]) == "image_truncated"


def test_a_jpeg_with_lost_data_in_its_middle_is_dropped():
    raw = bytearray(encode(RGB.resize((400, 300)), "JPEG", quality=95))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\xff\xd9" * 20
    assert reason_of(bytes(raw)) in ("image_damaged", "image_truncated")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_random_damage_gives_pixels_or_a_bad_sample_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    raw = encode(RGB, kind)
    for _ in range(100):
        damaged = bytearray(raw)
        for place in rng.integers(len(raw), size=3):
            damaged[place] = rng.integers(256)
        try:
            assert decode_rgb(bytes(damaged), MAX_PIXELS).dtype == np.uint8
        except BadSample as bad:
            assert bad.reason


def png_header(width, height):
    """A PNG that claims a size and has no pixels to speak of."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [2_000, 10_000, 12_000, 20_000, 60_000])
def test_a_picture_that_claims_too_many_pixels_is_never_decoded(side):
    # 10,000 and 12,000 lie where Pillow only warns, which would be an error here.
    assert reason_of(png_header(side, side)) == "too_large"


def test_the_pixel_limit_holds_for_jpegs_and_is_inclusive():
    for raw in (JPEGS["baseline"], JPEGS["cmyk"], encode(RGB, "PNG")):
        assert decode_rgb(raw, 48 * 64).shape == (48, 64, 3)
        assert reason_of(raw, 48 * 64 - 1) == "too_large"


@pytest.mark.parametrize(
    "raw",
    [
        encode(RGB, "EPS"),
        encode(RGB, "PPM"),
        encode(RGB, "ICO"),
        b"<html><body>404</body></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
    ],
)
def test_other_formats_are_refused_by_content(raw):
    assert reason_of(raw) == "format_not_allowed"


def test_the_extension_follows_the_content_and_not_the_name(tmp_path):
    for kind, extension in [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
    ]:
        path = tmp_path / "picture.bmp"
        path.write_bytes(encode(RGB, kind))
        assert image_extension(path) == extension
