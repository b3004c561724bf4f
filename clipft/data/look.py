"""One shard read whole -> its checksum, its structure, and what becomes of each of its samples."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from clipft.data.caption import checked_question
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples, index_places, join, read_index, shown_key
from clipft.data.manifest import sha256_of
from clipft.data.sample import IMAGE_KINDS, TEXT_KINDS, BadSample, failing_at, image_of
from clipft.data.shard import ShardIndex, scan_shard


@dataclass(frozen=True)
class Rules:
    """By what a sample is judged, as training and evaluation judge it."""

    decode: bool
    max_pixels: int
    text_errors: str
    num_classes: int


@dataclass(frozen=True)
class Lost:
    """A sample that cannot be used."""

    key: str
    reason: str
    byte: int
    """Of its first header."""


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
    lost: list[Lost] = field(default_factory=list)
    """All dropped samples."""
    ignored: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What shows that these are not the bytes that were written."""
    doubts: list[str] = field(default_factory=list)
    """What may show that the last of them are missing."""

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> samples."""
        return dict(Counter(each.reason for each in self.lost))


def look_at(path: str, rules: Rules) -> Looked:
    """The shard's checksum, its structure as its bytes are now, and what becomes of each of its samples."""
    try:
        sha256, index = sha256_of(Path(path)), scan_shard(path)
    except OSError as error:
        return Looked(path, problems=[f"cannot be read: {error.strerror or error}"])
    samples = join([path], [index])
    lost = [Lost(shown_key(path, key), reason, at) for reason, bad in index.dropped.items() for key, at in bad.items()]
    sums = Counter()
    for i in range(len(samples)):
        try:
            if index.problems:
                raise BadSample("in_damaged_shard")
            with failing_at(lambda i=i: samples.key(i)):
                sums.update(look_at_sample(samples, i, rules))
        except BadSample as bad:
            lost.append(Lost(samples.key(i), bad.reason, samples.byte(i)))
    return Looked(
        path=path,
        num_bytes=index.size,
        sha256=sha256,
        indexed=len(samples) + sum(samples.dropped.values()),
        fine=sums["fine"],
        captioned=sums["captioned"],
        labelled=sums["labelled"],
        lost=lost,
        ignored=samples.ignored,
        problems=[f"{what} (byte {byte} of {index.size})" for byte, what in index.problems] + stale(path, index),
        doubts=list(samples.doubts.values()),
    )


def look_at_sample(samples: Samples, i: int, rules: Rules) -> dict[str, int]:
    """A count of one sample, that is fine and may have captions and a label; BadSample where it cannot be used."""
    if not rules.decode:
        return {"fine": 1}
    members = samples.read(i, IMAGE_KINDS + TEXT_KINDS)
    label, captions = checked_question(members, rules.num_classes, rules.text_errors)
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
