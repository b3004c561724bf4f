"""One shard read whole -> its checksum, its structure, and what becomes of each of its samples."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from clipft.data.caption import question_of
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples, index_places, join, read_index
from clipft.data.manifest import sha256_of
from clipft.data.sample import IMAGE_KINDS, TEXT_KINDS, BadSample, image_of
from clipft.data.shard import ShardIndex, scan_shard


@dataclass(frozen=True)
class Rules:
    """By what a sample is judged, as training and evaluation judge it."""

    decode: bool
    max_pixels: int
    text_errors: str
    num_classes: int


@dataclass(frozen=True)
class Looked:
    """What one shard holds: indexed = fine + dropped."""

    path: str
    num_bytes: int = 0
    sha256: str | None = None
    indexed: int = 0
    fine: int = 0
    captioned: int = 0
    labelled: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first of the dropped samples."""
    ignored: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What shows that these are not the bytes that were written."""


def look_at(path: str, rules: Rules) -> Looked:
    """The shard's checksum, its structure as its bytes are now, and what becomes of each of its samples."""
    try:
        sha256, index = sha256_of(Path(path)), scan_shard(path)
    except OSError as error:
        return Looked(path, problems=[f"cannot be read: {error.strerror or error}"])
    samples = join([path], [index])
    dropped = Counter(samples.dropped)
    examples = dict(samples.examples)
    sums = Counter()
    for i in range(len(samples)):
        try:
            if index.problems:
                raise BadSample("in_damaged_shard")
            sums.update(look_at_sample(samples, i, rules))
        except BadSample as bad:
            dropped[bad.reason] += 1
            examples.setdefault(bad.reason, samples.key(i))
    return Looked(
        path=path,
        num_bytes=index.size,
        sha256=sha256,
        indexed=len(samples) + sum(samples.dropped.values()),
        fine=sums["fine"],
        captioned=sums["captioned"],
        labelled=sums["labelled"],
        dropped=dict(dropped),
        examples=examples,
        ignored=samples.ignored,
        problems=[f"{what} (byte {byte} of {index.size})" for byte, what in index.problems] + stale(path, index),
    )


def look_at_sample(samples: Samples, i: int, rules: Rules) -> dict[str, int]:
    """A count of one sample, that is fine and may have captions and a label; BadSample where it cannot be used."""
    if not rules.decode:
        return {"fine": 1}
    members = samples.read(i, IMAGE_KINDS + TEXT_KINDS)
    label, captions = question_of(members, rules.num_classes > 0, rules.text_errors)
    if label >= rules.num_classes > 0:
        raise BadSample("label_without_class")
    decode_rgb(image_of(members), rules.max_pixels)
    return {"fine": 1, "captioned": int(bool(captions)), "labelled": int(label >= 0)}


def stale(path: str, index: ShardIndex) -> list[str]:
    """What to say when the stored index, which training goes by, is another one than that of the shard's bytes.

    A copy that keeps the time of a file can put other bytes of the same size there, and nobody looks again.
    """
    for place in index_places(path):
        stored = read_index(place)
        if stored is not None and (stored.size, stored.mtime_ns) == (index.size, index.mtime_ns):
            return (
                [] if stored == index or index.problems else [f"its stored index is one of other bytes: delete {place}"]
            )
    return []
