"""Image bytes -> RGB pixels, whatever the format; or a BadSample with the reason."""

import re
import warnings
from io import BufferedReader, BytesIO

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from clipft.data import png
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
BITS, PHOTOMETRIC, PLANAR, TILE_WIDTH, TILE_LENGTH = 258, 262, 284, 322, 323  # TIFF tags
WHITE_IS_ZERO, SEPARATE = 0, 2
MOST_ASPECT = 100  # with 336 pixels on the shorter side, 34 MB
APP1, START_OF_SCAN = b"\xe1", b"\xda"  # second bytes of JPEG markers (ITU T.81, table B.1)
# libjpeg-turbo's words for lost image data. The others are about what does not touch the pixels, such as an odd ICC
# profile, or stray bytes: writers leave a few, or zeros before the end; more are data that were not understood.
JPEG_DAMAGE = re.compile(r"premature end of data segment|bad .+ code|instead of RST|Inconsistent progression")
JPEG_STRAY, MOST_STRAY = re.compile(r"(\d+) extraneous bytes before marker"), 8


def decode_rgb(raw: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The first frame, upright (EXIF), on white where it is transparent; contiguous and writable.

    Pillow's own limit of about 179 million pixels holds where max_pixels is above it.
    """
    pixels = decode_jpeg(raw, max_pixels) if raw.startswith(b"\xff\xd8\xff") else None
    if pixels is None:
        return decode_pillow(raw, max_pixels)
    if may_be_turned(raw):
        with open_image(BytesIO(raw)) as image:
            return upright(pixels, orientation_of(image))
    return pixels


def image_extension(file: BytesIO | BufferedReader) -> str:
    """The extension by content, whatever the file is called; reads the header only."""
    with open_image(file) as image:
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
    try:
        if colorspace in ("YCbCr", "RGB", "Gray"):
            return simplejpeg.decode_jpeg(raw, "RGB")
        # Inks are stored inverted, as Adobe does it, whether or not the file says that it is Adobe's.
        inks = 255 - simplejpeg.decode_jpeg(raw, "CMYK")
    except ValueError as error:
        # Pillow reads on silently over lost data and fills the rest with grey.
        if lost_data(str(error), raw):
            raise BadSample("image_damaged") from error
        return None
    return np.array(Image.fromarray(inks, "CMYK").convert("RGB"))


def lost_data(said: str, raw: bytes) -> bool:
    """Whether what libjpeg-turbo says about a JPEG means that pixels are lost."""
    stray = JPEG_STRAY.search(said)
    if stray is None:
        return JPEG_DAMAGE.search(said) is not None
    return int(stray[1]) > MOST_STRAY and bytes(int(stray[1])) + b"\xff\xd9" not in raw


def may_be_turned(raw: bytes) -> bool:
    """Whether a JPEG has EXIF or XMP before its image data, or no order that shows it has none.

    Pillow takes the orientation from either.
    """
    place = 2
    while raw[place : place + 1] == b"\xff":
        marker = raw[place + 1 : place + 2]
        if marker in (APP1, START_OF_SCAN):
            return marker == APP1
        # Any number of bytes 255 may stand before a marker.
        place += 1 if marker == b"\xff" else 2 + int.from_bytes(raw[place + 2 : place + 4], "big")
    return True


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raises for a picture that would take too much memory, here or where its shorter side is made the model's."""
    if height * width > max_pixels:
        raise BadSample("too_large")
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise BadSample("too_long")


def decode_pillow(raw: bytes, max_pixels: int, least_side: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels; with `least_side` a JPEG is only decoded to an eighth or more that keeps so many on its sides."""
    with open_image(BytesIO(raw)) as image:
        if least_side is not None:
            image.draft("RGB", (least_side, least_side))
        # A TIFF's tiles are decoded whole, however small the picture is that is cut from them.
        tile = tiff_tag(image, TILE_WIDTH, 0) * tiff_tag(image, TILE_LENGTH, 0)
        check_size(image.height, image.width, max_pixels)
        if tile > max_pixels:
            raise BadSample("too_large")
        if image.format == "PNG":
            png.check_sums(raw)
        try:
            with quiet():
                mend_planes(image)
                image.load()
                if image.format == "PNG":
                    png.check_rows(raw, image)
                    png.make_transparent(raw, image)
                return picture_of(image)
        except BadSample:
            raise
        except Exception as error:  # on damaged files Pillow raises all there is
            truncated = isinstance(error, EOFError) or "truncated" in str(error)
            raise BadSample("image_truncated" if truncated else "image_damaged") from error


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
    except Exception as error:
        raise BadSample("image_header_damaged") from error


def quiet() -> warnings.catch_warnings:
    """A context without Python's warnings: Pillow's are about size, which we check, and odd metadata."""
    return warnings.catch_warnings(action="ignore")


def tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """A tag's whole number, the same for all bands; the default where it is missing, odd, or the image is no TIFF."""
    try:
        with quiet():
            value = image.tag_v2.get(tag, default) if isinstance(image, TiffImageFile) else default
    except Exception:
        return default
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) else default


def mend_planes(image: Image.Image) -> None:
    """Of an uncompressed TIFF with a plane for each band Pillow reads 8 bits, not inverted, whatever there is."""
    if tiff_tag(image, PLANAR, 1) != SEPARATE or not isinstance(image, TiffImageFile):
        return
    rest = ""
    if image.mode in ("1", "L") and tiff_tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        rest = ";I"
    elif image.mode in ("RGB", "RGBA", "CMYK") and tiff_tag(image, BITS, 8) == 16:
        rest = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
    image.tile = [
        tile._replace(args=(tile.args[0] + rest, *tile.args[1:]))
        if tile.codec_name == "raw" and isinstance(tile.args, tuple)
        else tile
        for tile in image.tile
    ]


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a loaded image of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow inverts a TIFF whose zero is white only where it has 8 bits or less.
        inverted = tiff_tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO
        bits = min(tiff_tag(image, BITS, 16), 16)
        return grey_to_rgb(np.asarray(image), 2**bits - 1, inverted, image.info.get("transparency"))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except ValueError as error:  # LAB and other modes without a conversion
        raise BadSample("image_mode") from error


def grey_to_rgb(values: np.ndarray, white: int, inverted: bool, transparent: int | None) -> UInt8[np.ndarray, "H W 3"]:
    """Floats of 0..1 and integers of 0..white as 8 bits; Pillow's convert would clip them."""
    top = 1.0 if values.dtype.kind == "f" else float(white)
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
    except Exception:
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
