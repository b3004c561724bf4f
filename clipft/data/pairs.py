"""Samples to the units that an epoch is made of: the samples themselves, or their pairs of image and caption."""

import hashlib
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from clipft.data.caption import only_words, written_captions
from clipft.data.index import Samples
from clipft.data.sample import CAPTION_KINDS, PASSING, BadSample, failing_at
from clipft.files import replace_file, user_cache

VERSION = 3  # of the stored counts; to be raised when written_captions finds others in the same bytes


@dataclass(frozen=True, eq=False)
class Units:
    """What an epoch holds each of once. Without `ends` the samples, else the pairs in the order of the samples."""

    samples: Samples
    ends: Int64[np.ndarray, " samples"] | None
    """Number of the pair behind the last one of each sample."""

    def __len__(self) -> int:
        return len(self.samples) if self.ends is None else int(self.ends[-1])

    def at(self, u: int) -> tuple[int, int | None]:
        """Sample and caption number of a unit; None for a caption that is to be drawn."""
        if self.ends is None:
            return u, None
        i = int(np.searchsorted(self.ends, u, side="right"))
        return i, u - int(self.ends[i - 1]) if i else u

    def number(self, i: int, caption: int) -> int:
        """The unit of this sample and caption; BadSample where so many were not found when they were counted."""
        if self.ends is None:
            return i
        u = caption + (int(self.ends[i - 1]) if i else 0)
        if u >= self.ends[i]:
            raise BadSample("read_error")
        return u

    def per_shard(self) -> Int64[np.ndarray, " shards"]:
        """Units of each shard; the units lie in the order of the shards."""
        counts = np.ones(len(self.samples)) if self.ends is None else np.diff(self.ends, prepend=0)
        return np.bincount(self.samples.rows[:, 0], counts, minlength=len(self.samples.shards)).astype(np.int64)

    def key(self, u: int) -> str:
        """The sample's key; for a pair with the number of its caption behind it."""
        i, number = self.at(u)
        return self.samples.key(i) + ("" if number is None else f"#{number}")


def build_units(samples: Samples, captions: str, text_errors: str = "strict") -> Units:
    """The units of `data.captions`: samples (one) or pairs (all)."""
    if captions not in ("one", "all"):
        raise ValueError(f"data.captions={captions!r} is unknown. Use one or all.")
    return Units(samples, np.cumsum(count_captions(samples, text_errors)) if captions == "all" else None)


def count_captions(samples: Samples, text_errors: str = "strict") -> Int64[np.ndarray, " samples"]:
    """Captions of each sample; 1 where there are none to read, so that it keeps a slot and is dropped by name."""
    place = counts_place(samples, text_errors)
    counts = read_counts(place, len(samples))
    if counts is None:
        if samples.remote is not None:
            print("data.captions=all: every shard is read once to count its captions", file=sys.stderr, flush=True)
        counts = np.fromiter((num_captions(samples, i, text_errors) for i in range(len(samples))), np.int64)
        if counts.all():
            write_counts(place, counts)
    return np.maximum(counts, 1)


def num_captions(samples: Samples, i: int, text_errors: str) -> int:
    """Captions of sample i, 1 where its members name none; 0 where the storage fails, which may pass."""
    try:
        with failing_at(lambda: samples.key(i)):
            return len(written_captions(samples.read(i, CAPTION_KINDS), text_errors))
    except BadSample as bad:
        return 0 if bad.reason in PASSING else 1


def caption_at(captions: list[str], number: int) -> str:
    """One of a sample's captions in words; BadSample where it has fewer than were counted."""
    if number >= len(captions):
        raise BadSample("no_caption")
    return only_words(captions[number])


def counts_place(samples: Samples, text_errors: str = "strict") -> Path:
    """Where the counts of these samples lie in the user's cache: another name when a shard was written again."""
    # The fingerprint alone does not see a change that keeps every size.
    digest = hashlib.sha256(f"{VERSION} {text_errors} {samples.fingerprint} {samples.stamps.tolist()}".encode())
    return user_cache() / "captions" / digest.hexdigest()


def read_counts(place: Path, num_samples: int) -> Int64[np.ndarray, " samples"] | None:
    """The stored counts; None when there are none that can be used."""
    try:
        raw = place.read_bytes()
    except OSError:
        return None
    # No .npy file: a flipped bit in its header can raise anything, and one in its numbers goes unseen.
    digest, content = raw[:32], raw[32:]
    if hashlib.sha256(content).digest() != digest or len(content) != 8 * num_samples:
        return None
    return np.frombuffer(content, "<i8")


def write_counts(place: Path, counts: Int64[np.ndarray, " samples"]) -> None:
    """Store the counts behind their sha256."""
    content = counts.astype("<i8").tobytes()
    with suppress(OSError):  # a read-only or full place: they are counted at each start
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, hashlib.sha256(content).digest() + content)
