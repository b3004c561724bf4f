"""Items -> what is seen of each: size, looks, light, sharpness, captions and their tokens, or why it cannot be used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import numpy as np
from jaxtyping import Float
from PIL import Image

from clipft.data.caption import checked_question
from clipft.data.check.items import Contents, Item
from clipft.data.decode import decode_rgb, open_image
from clipft.data.fingerprint import image_digest, put_looks, refuse_path
from clipft.data.progress import Progress
from clipft.data.sample import BadSample, failing_at
from clipft.data.sources.place import read_place
from clipft.data.workers import map_items, num_workers

CHUNK = 128  # items looked at in one go
SEEN_PX = 224  # shorter side at which light and sharpness are measured: what a model sees, whatever the camera
THUMB_PX = 96  # longer side
MOST_THUMBS = 20_000  # pictures of more images would make findings.parquet larger than 60 MB

LOOK = np.dtype(
    [
        ("mode", "U8"),
        ("format", "U8"),
        ("bytes", np.int64),
        ("height", np.int32),
        ("width", np.int32),
        ("digest", np.uint64),
        ("hashed", np.bool_),  # whether the next two mean anything: not for large flat grounds
        ("hash", np.uint64, 2),
        ("colours", np.uint8, 48),
        ("light", np.float32),  # grey value, 0..1, that at most 1 in 100 pixels exceeds
        ("contrast", np.float32),  # standard deviation of the grey values, 0..1
        ("sharpness", np.float32),
    ]
)
"""What is seen of an image."""


@dataclass(frozen=True)
class Rules:
    """By what an item is judged, as training judges it."""

    max_pixels: int
    text_errors: str
    num_classes: int
    limit: str | None
    count: Callable[[list[str]], list[int]]
    thumbs: bool


@dataclass
class Seen:
    """Of each item, in their order."""

    looks: np.ndarray
    reasons: list[str]
    """Empty where it can be used."""
    captions: list[list[str]]
    """None of an item that cannot be used."""
    tokens: list[list[int]]
    labels: list[int]
    """Class number, -1 without."""
    thumbs: list[bytes]
    """A small JPEG, empty without."""


def look_at_all(
    contents: Contents, count: Callable[[list[str]], list[int]], max_pixels: int, text_errors: str, workers: int | None
) -> Seen:
    """All items, by several processes (0: by this one), with progress on stderr."""
    thumbs = len(contents.items) <= MOST_THUMBS
    rules = Rules(max_pixels, text_errors, len(contents.classnames), contents.limit, count, thumbs)
    chunks = [contents.items[start : start + CHUNK] for start in range(0, len(contents.items), CHUNK)]
    sizes = [len(chunk) for chunk in chunks]
    progress = Progress("looking at", "images", sum(sizes))
    workers = num_workers(workers)
    parts = map_items(partial(look_at, rules=rules), chunks, workers, progress, "data.workers", sizes)
    looks = [part.looks for part in parts]
    return Seen(
        looks=np.concatenate(looks) if looks else np.zeros(0, LOOK),
        reasons=[each for part in parts for each in part.reasons],
        captions=[each for part in parts for each in part.captions],
        tokens=[each for part in parts for each in part.tokens],
        labels=[each for part in parts for each in part.labels],
        thumbs=[each for part in parts for each in part.thumbs],
    )


def look_at(items: Sequence[Item], rules: Rules) -> Seen:
    seen = Seen(np.zeros(len(items), LOOK), [], [], [], [], [])
    for item, look in zip(items, seen.looks, strict=True):
        label, captions, thumb, reason = -1, [], b"", item.reason
        if not reason:
            try:
                with failing_at(lambda item=item: item.key):
                    label, captions = texts_of(item, rules)
                    thumb = fill(look, image_of_item(item, rules), rules)
            except BadSample as bad:
                label, captions, reason = -1, [], bad.reason
        seen.reasons.append(reason)
        seen.captions.append(captions)
        seen.labels.append(label)
        seen.thumbs.append(thumb)
    numbers = iter(rules.count([caption for captions in seen.captions for caption in captions]))
    seen.tokens = [[next(numbers) for _ in captions] for captions in seen.captions]
    return seen


def texts_of(item: Item, rules: Rules) -> tuple[int, list[str]]:
    """Label and captions, at least one of them."""
    members = {kind: read_place(place) for kind, place in item.texts.items()}
    return checked_question(members, rules.num_classes, rules.text_errors)


def image_of_item(item: Item, rules: Rules) -> bytes:
    assert item.image is not None
    try:
        refuse_path(item.image, rules.limit)
        return read_place(item.image)
    except OSError as error:
        raise BadSample("image_unreadable") from error


def fill(look: np.void, raw: bytes, rules: Rules) -> bytes:
    """Writes what is seen of an image into its record; the thumbnail, where one is wanted."""
    pixels = decode_rgb(raw, rules.max_pixels)
    with open_image(BytesIO(raw)) as image:
        look["mode"], look["format"] = image.mode, "JPEG" if image.format == "MPO" else str(image.format)
    look["bytes"], look["digest"] = len(raw), image_digest(raw)
    look["height"], look["width"] = pixels.shape[:2]
    small = shrunk(Image.fromarray(pixels), SEEN_PX)
    put_looks(look, np.asarray(small))
    plain = small.convert("L")
    grey = np.asarray(plain, np.float32) / 255
    look["light"], look["contrast"], look["sharpness"] = light(plain.histogram()), grey.std(), sharpness(grey)
    return thumbnail(small) if rules.thumbs else b""


def light(histogram: list[int]) -> float:
    """The lowest of 256 grey values that at most 1 in 100 pixels exceeds, as 0..1."""
    below = np.cumsum(histogram)
    return int(np.searchsorted(below, 0.99 * below[-1])) / 255


def shrunk(image: Image.Image, shorter_px: int) -> Image.Image:
    """The picture with a shorter side of so many pixels, where it has more; each one is the mean of those it covers."""
    scale = shorter_px / min(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX)


def sharpness(grey: Float[np.ndarray, "H W"]) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) per variance of the grey values; 0 for one flat colour.

    The ratio makes pictures of low and of high contrast comparable.
    """
    if min(grey.shape) < 3 or (variance := float(grey.var())) < 1e-6:
        return 0.0
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return float(laplacian.var()) / variance


def thumbnail(image: Image.Image, longer_px: int = THUMB_PX) -> bytes:
    """The picture as a small JPEG."""
    small, file = image.copy(), BytesIO()
    small.thumbnail((longer_px, longer_px))
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def picture_of(item: Item, max_pixels: int, longer_px: int) -> bytes | None:
    """A larger picture of an item, for a page; None where it can no longer be read."""
    assert item.image is not None
    try:
        return thumbnail(Image.fromarray(decode_rgb(read_place(item.image), max_pixels)), longer_px)
    except (BadSample, OSError):
        return None
