"""What the members of a sample are called, and how an unusable one is reported."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clipft.report import RunFailed

IMAGE_KINDS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif")
CAPTION_KINDS = ("json", "txt")
TEXT_KINDS = (*CAPTION_KINDS, "cls")
PASSING = ("read_error", "short_read", "shard_changed")  # faults of the storage, which may be over at the next start


class BadSample(Exception):
    """A sample that cannot be used; `reason` is a short snake_case word that reports count by."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@contextmanager
def failing_at(key: Callable[[], str]) -> Iterator[None]:
    """Inside it, an error that is none of a sample's known faults ends everything with the sample's key."""
    try:
        yield
    except (BadSample, RunFailed):
        raise
    except Exception as error:
        raise RuntimeError(f"reading {key()} failed: {type(error).__name__}: {error}") from error


def printable(text: str) -> str:
    """The text on one line, with what would steer a terminal, or turn the reading direction, as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def image_of(members: dict[str, bytes]) -> bytes:
    """The image's bytes; of several images the first in the order of IMAGE_KINDS."""
    for kind in IMAGE_KINDS:
        if kind in members:
            return members[kind]
    raise BadSample("no_image")
