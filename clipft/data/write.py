"""Rows -> shards: each is written under another name and renamed when it is whole, and kept where it is finished."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from clipft.config import ImageConfig
from clipft.data.building import AGAIN, Building
from clipft.data.decode import decode_rgb, open_image
from clipft.data.fingerprint import MOST_PIXELS
from clipft.data.index import write_index
from clipft.data.manifest import sha256_of
from clipft.data.progress import Progress
from clipft.data.sample import BadSample
from clipft.data.sources.place import Place, read_place, stamp_of, stem_of
from clipft.data.sources.row import Row, text_members
from clipft.data.workers import map_items
from clipft.files import replace_file
from clipft.report import RunFailed

VERSION = 1  # of the notes on finished shards; those of another version are written again
QUALITY = 95
EACH = 8  # shards per process that are worth one: it takes 4 s to import webdataset


@dataclass(frozen=True)
class Shard:
    """A shard to be written: its samples, and the kinds of their images by content."""

    name: str
    rows: list[Row]
    kinds: list[str]


@dataclass(frozen=True)
class Written:
    """A finished shard."""

    name: str
    content: str
    """Digest of what it was made from: an equal one makes the same bytes."""
    samples: int
    captions: int
    bytes: int
    sha256: str
    not_scaled: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys of large images that could not be decoded and keep their bytes."""


def write_shards(
    place: Building, shards: list[Shard], classes: list[str], image: ImageConfig, workers: int
) -> list[Written]:
    """Writes the shards that are not finished yet, by several processes, and takes away what belongs to none."""
    number_of = {label: number for number, label in enumerate(classes)}
    clean(place, {shard.name for shard in shards})
    write = partial(write_or_keep, place=place, number_of=number_of, image=image)
    # Processes are worth their start where there is much to do.
    workers = workers if image.max_size is not None else min(workers, len(shards) // EACH)
    sizes = [len(shard.rows) for shard in shards]
    return map_items(write, shards, workers, Progress("writing", "images", sum(sizes)), "workers", sizes)


def clean(place: Building, names: set[str]) -> None:
    """Removes shards of another plan, half-written ones, and notes on them."""
    for file in [*place.set.iterdir(), *place.notes.glob("*.json")]:
        if file.name.removesuffix(".json").removesuffix(".index") not in names:
            file.unlink()


def write_or_keep(shard: Shard, place: Building, number_of: dict[str, int], image: ImageConfig) -> Written:
    """What is known of the shard, which is written unless it is there, made from the same rows."""
    content = content_of(shard, number_of, image)
    note = place.notes / f"{shard.name}.json"
    path = place.set / shard.name
    with suppress(OSError, ValueError, TypeError):
        known = Written(**json.loads(note.read_text("utf-8")))
        if known.content == content and path.stat().st_size == known.bytes:
            return known
    written = write_shard(path, shard, content, number_of, image)
    replace_file(note, json.dumps(asdict(written)))
    return written


def content_of(shard: Shard, number_of: dict[str, int], image: ImageConfig) -> str:
    digest = hashlib.blake2b(digest_size=16)
    scaling = [asdict(image), PIL.__version__, simplejpeg.__version__] if image.max_size is not None else []
    digest.update(json.dumps([VERSION, scaling]).encode())
    for row, kind in zip(shard.rows, shard.kinds, strict=True):
        number = None if row.label is None else number_of[row.label]
        digest.update(json.dumps([row.key, kind, row.captions, number, row.rest, *stamp_of(row.image)]).encode())
    return digest.hexdigest()


def write_shard(path: Path, shard: Shard, content: str, number_of: dict[str, int], image: ImageConfig) -> Written:
    """One tar whose bytes depend on the rows alone; it has its name when it is whole and on the disk."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    temporary = path.with_name(f".{path.name}.tmp")
    not_scaled: dict[str, list[str]] = {}
    try:
        with open(temporary, "wb") as file:
            with TarWriter(file, user="clipft", group="clipft", mode=0o644, mtime=0, encoder=False) as tar:
                for row, kind in zip(shard.rows, shard.kinds, strict=True):
                    kind, raw, reason = image_member(row.image, kind, image)
                    if reason is not None:
                        not_scaled.setdefault(reason, []).append(row.key)
                    tar.write({"__key__": row.key, kind: raw, **other_members(row, number_of)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunFailed(f"{path} could not be written ({error.strerror or error}). {AGAIN}") from error
    finally:
        temporary.unlink(missing_ok=True)  # also to make room on a full disk
    size = write_index(path).size
    num_captions = sum(len(row.captions) for row in shard.rows)
    return Written(shard.name, content, len(shard.rows), num_captions, size, sha256_of(path), not_scaled)


def other_members(row: Row, number_of: dict[str, int]) -> dict[str, bytes]:
    members = text_members(json.loads(row.rest), row.captions)
    return members if row.label is None else {**members, "cls": str(number_of[row.label]).encode()}


def image_member(place: Place, kind: str, image: ImageConfig) -> tuple[str, bytes, str | None]:
    """Extension and bytes of the image; scaled down where it is too large, else with the reason why that failed."""
    try:
        raw = read_place(place)
    except (OSError, BadSample) as error:
        name = place if isinstance(place, str) else f"the image {stem_of(place)}"
        raise RunFailed(
            f"{name} cannot be read any more ({error}): the source changed while it was packed. Run the same command "
            "again: what is finished is kept."
        ) from error
    if image.max_size is None:
        return kind, raw, None
    try:
        with open_image(BytesIO(raw)) as header:
            if min(header.size) <= image.max_size:
                return kind, raw, None
        return "jpg", scaled(decode_rgb(raw, MOST_PIXELS), image.max_size, image.quality or QUALITY), None
    except BadSample as bad:
        return kind, raw, bad.reason


def scaled(pixels: UInt8[np.ndarray, "H W 3"], max_size: int, quality: int) -> bytes:
    """JPEG of the picture, upright, with a shorter side of max_size pixels."""
    height, width = pixels.shape[:2]
    factor = max_size / min(height, width)
    size = (max(max_size, round(width * factor)), max(max_size, round(height * factor)))
    out = BytesIO()
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    small.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()
