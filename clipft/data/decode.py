"""Image bytes -> RGB pixels, whatever the format; or a BadSample with the reason."""

import warnings
from io import BufferedReader, BytesIO
from pathlib import Path
from struct import error as StructError

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from clipft.data.sample import BadSample

# Pillow formats that are decoded by libraries inside the process. Others, such as EPS, start helper programs.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with more pictures behind the first; Pillow's JPEG plugin opens it under this name
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")
# First bytes of these formats: tells a damaged header from a format that is not allowed.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
ORIENTATION = 0x0112  # EXIF tag
PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 262, 322, 323  # TIFF tags
WHITE_IS_ZERO = 0
MOST_ASPECT = 100  # with 336 pixels on the shorter side, 34 MB
PNG_DEPTH = 24  # byte of a PNG that holds the bits of a sample
# What Pillow raises on damaged files, beside OSError; bombs in text chunks and tags are ValueErrors.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, StructError, MemoryError)
# libjpeg-turbo's words for lost image data; its other warnings are about harmless stray bytes.
JPEG_DAMAGE = ("premature end of data segment", "bad Huffman code")


def decode_rgb(raw: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The first frame, upright (EXIF), on white where it is transparent; contiguous and writable.

    Pillow's own limit of about 179 million pixels holds where max_pixels is above it.
    """
    pixels = decode_jpeg(raw, max_pixels) if raw.startswith(b"\xff\xd8\xff") else None
    if pixels is None:
        return decode_pillow(raw, max_pixels)
    # Pillow also takes the orientation from XMP, so both are looked for; most files have neither.
    if b"Exif\x00\x00" in raw or b"tiff:Orientation" in raw:
        with open_image(BytesIO(raw)) as image:
            return upright(pixels, orientation_of(image))
    return pixels


def image_extension(path: Path) -> str:
    """The extension by content, whatever the file is called; reads the header only."""
    with open(path, "rb") as file, open_image(file) as image:
        if image.width * image.height == 0:
            raise BadSample("image_empty")
        return EXTENSIONS[str(image.format)]


def decode_jpeg(raw: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"] | None:
    """Pixels by libjpeg-turbo, not yet upright; None where Pillow has to look at the file."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:
        return None
    check_size(int(height), int(width), max_pixels)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        return simplejpeg.decode_jpeg(raw, "RGB")
    except ValueError as error:
        # Pillow reads on silently over lost data and fills the rest with grey.
        if any(damage in str(error) for damage in JPEG_DAMAGE):
            raise BadSample("image_damaged") from error
        return None


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raises for a picture that would take too much memory, here or where its shorter side is made the model's."""
    if height * width > max_pixels:
        raise BadSample("too_large")
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise BadSample("too_long")


def decode_pillow(raw: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    with open_image(BytesIO(raw)) as image:
        # A TIFF's tiles are decoded whole, however small the picture is that is cut from them.
        tile = tiff_tag(image, TILE_WIDTH, 0) * tiff_tag(image, TILE_LENGTH, 0)
        check_size(image.height, image.width, max_pixels)
        if tile > max_pixels:
            raise BadSample("too_large")
        try:
            with quiet():
                image.load()
        except DECODE_ERRORS as error:
            truncated = isinstance(error, EOFError) or "truncated" in str(error)
            raise BadSample("image_truncated" if truncated else "image_damaged") from error
        if image.format == "PNG":
            scale_transparent_colour(image, raw[PNG_DEPTH])
        return picture_of(image)


def picture_of(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of an opened image of any mode as decode_rgb gives them; OSError where its file is damaged."""
    image.load()  # before the orientation: Pillow turns TIFFs by itself there, and PNGs may keep EXIF behind the pixels
    return upright(to_rgb(image), orientation_of(image))


def open_image(file: BytesIO | BufferedReader) -> Image.Image:
    """The image with its header read and nothing decoded."""
    head = file.read(8)
    file.seek(0)
    if not head:
        raise BadSample("image_empty")
    try:
        with quiet():
            return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("too_large") from error
    except UnidentifiedImageError as error:
        known = head.startswith(MAGIC)
        raise BadSample("image_header_damaged" if known else "format_not_allowed") from error
    except DECODE_ERRORS as error:
        raise BadSample("image_header_damaged") from error


def quiet() -> warnings.catch_warnings:
    """A context without Python's warnings: Pillow's are about size, which we check, and odd metadata."""
    return warnings.catch_warnings(action="ignore")


def tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """A tag that holds one whole number; the default where it is missing, odd, or the image is no TIFF."""
    try:
        with quiet():
            value = image.tag_v2.get(tag, default) if isinstance(image, TiffImageFile) else default
    except DECODE_ERRORS:
        return default
    return value if isinstance(value, int) else default


def scale_transparent_colour(image: Image.Image, depth: int) -> None:
    """The colour that a PNG names transparent, in the 8 bits that Pillow has scaled the pixels to."""
    colour = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a loaded image of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow inverts a TIFF whose zero is white only where it has 8 bits or less.
        inverted = tiff_tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO
        return grey_to_rgb(np.asarray(image), inverted, image.info.get("transparency"))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except ValueError as error:  # LAB and other modes without a conversion
        raise BadSample("image_mode") from error


def grey_to_rgb(values: np.ndarray, inverted: bool, transparent: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """Floats of 0..1 and integers of 0..65535 as 8 bits; Pillow's convert would clip them."""
    top = 1.0 if values.dtype.kind == "f" else 65535.0
    # Written so that NaN fails too. Other ranges have no agreed meaning.
    if not (values.min() >= 0 and values.max() <= top):
        raise BadSample("image_range")
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if transparent is not None:
        grey[values == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 where it is missing, unreadable or unknown."""
    try:
        with quiet():
            value = image.getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def upright(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture as it is meant to be seen (EXIF 2.32, table 6: where row 0 and column 0 lie)."""
    if orientation == 1:
        return pixels
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    turned = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    return np.ascontiguousarray(turned[::down, ::across])
