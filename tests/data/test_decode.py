import struct
import zlib
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from pictures import png, png_file, tiff
from PIL import Image, ImageOps

from clipft.data.decode import decode_rgb, image_extension, may_be_turned
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


def outcome(raw):
    """used, or the reason."""
    try:
        decode_rgb(raw, MAX_PIXELS)
        return "used"
    except BadSample as bad:
        return bad.reason


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


def segment(kind: int, content: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


@pytest.mark.parametrize("content", [XMP, EXIF])
@pytest.mark.parametrize("before", [b"", b"\xff\xff", segment(0xFE, b"a comment")])
def test_a_jpeg_is_turned_wherever_its_header_says_so(before, content):
    plain = encode(RGB, "JPEG", quality=95)
    raw = plain[:20] + before + segment(0xE1, content) + plain[20:]  # behind the JFIF header of 20 bytes
    assert_close(decode_rgb(raw, MAX_PIXELS), np.rot90(by_pillow(plain), -1))


def test_words_behind_the_header_turn_no_jpeg():
    plain = encode(RGB, "JPEG", quality=95)
    assert not may_be_turned(plain)
    assert not may_be_turned(plain + segment(0xE1, EXIF))
    assert may_be_turned(plain[:20] + b"junk" + plain[20:])


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


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8).repeat(6, 0).repeat(6, 1))
CODINGS = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "grey": ("L", {}),
    "cmyk": ("CMYK", {}),
    "restart markers": ("RGB", {"restart_marker_rows": 1}),
    "cmyk, restart markers": ("CMYK", {"restart_marker_blocks": 4}),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_a_jpeg_with_a_hole_or_without_its_second_half_is_dropped_however_it_is_coded(coding):
    mode, options = CODINGS[coding]
    raw = encode(NOISE.convert(mode), "JPEG", quality=85, **options)
    places = range(len(raw) // 3, len(raw) - 3000, 1111)
    holes = Counter(outcome(raw[:place] + bytes(2048) + raw[place + 2048 :]) for place in places)
    assert len(places) > 10 and holes.pop("used", 0) <= 1  # where the zeros happen to stand for as many blocks
    assert set(holes) == {"image_damaged"}
    assert all(reason_of(raw[:place] + b"\xff\xd9") == "image_damaged" for place in places)


def test_a_ycck_jpeg_without_its_second_half_is_dropped():
    raw = JPEGS["ycck"]
    assert reason_of(raw[: len(raw) * 2 // 3] + b"\xff\xd9") == "image_damaged"


@pytest.mark.parametrize("stray, harmless", [(b"\1\2\3\4\5\6\7\x08", True), (bytes(5000), True), (b"\1" * 40, False)])
def test_a_few_stray_bytes_or_zeros_before_the_end_of_a_jpeg_are_no_lost_data(stray, harmless):
    raw = JPEGS["baseline"]
    assert raw.endswith(b"\xff\xd9")
    if harmless:
        assert_close(decode_rgb(raw[:-2] + stray + raw[-2:], MAX_PIXELS), by_pillow(raw))
    else:
        assert reason_of(raw[:-2] + stray + raw[-2:]) == "image_damaged"


def no_palette():
    """Pillow meets it with an assertion."""
    return png_file(20, 20, 8, 3, bytes(21 * 20))


def endless_offset():
    """A TIFF whose pixels are said to lie behind 2^63 bytes: too far for Pillow's seek."""
    raw = tiff(24, 20, bytes(24 * 20), {258: [8], 262: [1], 277: [1], 273: [0, 1 << 31]})
    longs, long8 = struct.pack("<HHI", 273, 4, 2), struct.pack("<HHI", 273, 16, 1)
    assert longs in raw
    return raw.replace(longs, long8)


@pytest.mark.parametrize("make", [no_palette, endless_offset])
def test_a_file_at_which_pillow_fails_in_any_way_is_a_bad_sample(make):
    with pytest.raises((AssertionError, OverflowError)), Image.open(BytesIO(make())) as image:
        image.load()
        assert image.has_transparency_data is not None
    assert reason_of(make()) == "image_damaged"


def test_a_png_whose_checksum_is_not_that_of_its_pixels_is_dropped():
    raw = encode(RGB, "PNG")
    end = raw.index(b"IEND") - 8
    assert reason_of(raw[:end] + bytes([raw[end] ^ 1]) + raw[end + 1 :]) == "image_damaged"
    assert_close(decode_rgb(raw[: end + 2], MAX_PIXELS), scene())  # nothing but the end of the checksum is lost


def interlaced(pixels):
    """The rows of an 8-bit grey picture pass by pass (PNG, 8.2)."""
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [row for x, y, dx, dy in starts for row in pixels[y::dy, x::dx] if row.size]
    return [b"\0" + row.tobytes() for row in rows]


@pytest.mark.parametrize("height, width", [(48, 64), (13, 3), (1, 1), (7, 2)])
@pytest.mark.parametrize("interlace", [0, 1])
def test_a_png_that_ends_before_its_last_row_is_dropped_and_black_rows_are_not(height, width, interlace):
    for pixels in (scene()[:height, :width, 0], np.zeros((height, width), np.uint8)):
        rows = interlaced(pixels) if interlace else [b"\0" + row.tobytes() for row in pixels]
        raw = png_file(width, height, 8, 0, b"".join(rows), interlace=interlace)
        assert_close(decode_rgb(raw, MAX_PIXELS), pixels[:, :, None].repeat(3, axis=2))
        for kept in {0, len(rows) // 2, len(rows) - 1}:
            short = png_file(width, height, 8, 0, b"".join(rows[:kept]), interlace=interlace)
            assert reason_of(short) in ("image_damaged", "image_truncated")


def test_of_a_deep_png_the_transparent_colour_is_white_and_its_neighbours_are_not():
    pixels = np.full((6, 8, 3), (24415, 33410, 49858))
    pixels[::2, 1::2, 2] += 1  # the same in 8 bits
    raw = png(pixels, 16, 2, (b"tRNS", struct.pack(">HHH", 24415, 33410, 49858)))
    expected = np.full((6, 8, 3), 255.0)
    expected[::2, 1::2] = pixels[0, 1] / 257
    assert_close(decode_rgb(raw, MAX_PIXELS), expected)


def test_a_tiff_of_twelve_bits_is_scaled_by_twelve_bits():
    values = np.arange(20 * 24).reshape(20, 24) * 4095 // (20 * 24 - 1)
    bits = "".join(f"{value:012b}" for value in values.flatten().tolist())
    raw = tiff(24, 20, int(bits, 2).to_bytes(len(bits) // 8, "big"), {258: [12], 262: [1], 277: [1]})
    assert_close(decode_rgb(raw, MAX_PIXELS), (values * 255 / 4095)[:, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("order", "<>")
def test_a_tiff_with_a_plane_for_each_band_shows_its_colours(order):
    deep = scene()[:20, :24].astype(np.uint16) * 257 + 5
    planes = [np.ascontiguousarray(deep[:, :, band]).astype(f"{order}u2").tobytes() for band in range(3)]
    tags = {258: [16] * 3, 262: [2], 277: [3], 284: [2], 273: [8, 968, 1928], 279: [960] * 3}
    assert_close(decode_rgb(tiff(24, 20, b"".join(planes), tags, order), MAX_PIXELS), deep / 257)
    grey = scene()[:20, :24, 0]
    inverted = tiff(24, 20, grey.tobytes(), {258: [8], 262: [0], 277: [1], 284: [2]}, order)
    assert_close(decode_rgb(inverted, MAX_PIXELS), 255 - grey[:, :, None].repeat(3, axis=2))


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
        with open(path, "rb") as file:
            assert image_extension(file) == extension
