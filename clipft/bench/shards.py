"""Shards to measure with: drawn photos of a given size, or the first captions of a packed set."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clipft.config import DataConfig
from clipft.data.caption import captions_of
from clipft.data.decode import decode_rgb
from clipft.data.sample import image_of
from clipft.data.split import load_splits

QUALITY = 90  # of JPEG, about what cameras and the web use
LIGHT_SLOPE, COLOUR_SLOPE = 1.3, 1.5  # of amplitude over frequency, both logarithmic
WORDS = "a the two man woman dog red blue large small on in with of beside near running grass water street".split()
DISTINCT = 256  # photos that are drawn; they come again, with other captions
MEAN_WORDS, MOST_WORDS = 11, 24  # of captions as people write them (Flickr8k: 10.9 words)


def draw_samples(side: int, num: int, square: bool = False) -> Iterator[tuple[bytes, str]]:
    """JPEG bytes of `side` x 3/4 `side` pixels, or of a square, and a caption; the same ones each time."""
    rng, height = np.random.default_rng(side), side if square else side * 3 // 4
    drawn: list[bytes] = []
    for number in range(num):
        if number < DISTINCT:
            drawn.append(as_jpeg(draw_photo(height, side, rng)))
        yield drawn[number % DISTINCT], draw_caption(rng)


def draw_captions(num: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [draw_caption(rng) for _ in range(num)]


def draw_caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, int(np.clip(rng.poisson(MEAN_WORDS), 3, MOST_WORDS))))


def draw_photo(height: int, width: int, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Coloured noise whose spectrum falls with the frequency as that of photographs does.

    At quality 90 about 3 bits a pixel; photographs of Flickr8k have 2.9.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = 1

    def plane(slope: float) -> np.ndarray:
        values = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**slope, (height, width))
        return values / values.std()

    light, warm, green = plane(LIGHT_SLOPE), plane(COLOUR_SLOPE), plane(COLOUR_SLOPE)
    rgb = np.stack([light + 0.3 * warm, light + 0.2 * green, light - 0.3 * warm], axis=2)
    return (128 + 50 * rgb).clip(0, 255).astype(np.uint8)


def as_jpeg(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def first_captions(data: str, num: int) -> Iterator[tuple[bytes, str]]:
    """JPEG bytes and the first caption of the first `num` training samples of a packed set."""
    train = load_splits(DataConfig(path=data)).train
    if train is None or len(train) < num:
        raise ValueError(f"data={data!r} has {len(train or [])} training samples, and {num} are needed.")
    for i in range(num):
        members = train.read(i)
        raw = image_of(members)
        jpeg = raw if raw.startswith(b"\xff\xd8\xff") else as_jpeg(decode_rgb(raw, 64_000_000))
        yield jpeg, captions_of(members)[0]


def write_shards(folder: Path, samples: Iterator[tuple[bytes, str]], per_shard: int) -> list[str]:
    """Paths of the shards, one caption per sample, so that every reader sees the same pairs."""
    from webdataset.writer import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number, (jpeg, caption) in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", "jpg": jpeg, "txt": caption})
    return sorted(str(path) for path in folder.glob("*.tar"))
