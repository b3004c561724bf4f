"""Features of a locked tower on disk: parts that are whole or not there, each row with its feature or a reason."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from clipft.data.pairs import Units
from clipft.data.sample import PASSING, BadSample
from clipft.files import replace_file

PART_ROWS = 1024  # at least; so many are made again after a kill
MOST_PARTS = 4096  # a process has as many open; Linux allows it 65,530 mapped files
REASON_BYTES = 32
DIGEST_BYTES = 32


class Part:
    """A part's reasons, empty where there is a feature, and features; these are read when they are asked for."""

    def __init__(self, path: str, rows: int, width: int):
        raw = np.memmap(path, np.uint8, "r")
        start = DIGEST_BYTES + REASON_BYTES * rows
        self.reasons = raw[DIGEST_BYTES:start].view(f"S{REASON_BYTES}")
        self.features = raw[start:].view("<f4").reshape(rows, width)


open_part = lru_cache(MOST_PARTS)(Part)


@dataclass(frozen=True, eq=False)
class Kept:
    """A tower's unit features of all units of a split, in a folder that belongs to exactly these features."""

    folder: Path
    units: Units
    """What has a feature each: the samples for an image tower, the pairs for a text tower."""
    width: int

    @property
    def part_rows(self) -> int:
        return max(PART_ROWS, -(-len(self.units) // MOST_PARTS))

    @property
    def num_parts(self) -> int:
        return -(-len(self.units) // self.part_rows)

    def rows_of(self, part: int) -> range:
        """The units of a part."""
        return range(part * self.part_rows, min((part + 1) * self.part_rows, len(self.units)))

    def path(self, part: int) -> Path:
        return self.folder / f"{part:04d}"

    def num_bytes(self, part: int) -> int:
        return DIGEST_BYTES + len(self.rows_of(part)) * (REASON_BYTES + 4 * self.width)

    def is_there(self, part: int) -> bool:
        """Whether the part has been made; its bytes are not looked at."""
        try:
            return os.stat(self.path(part)).st_size == self.num_bytes(part)
        except OSError:
            return False

    def is_whole(self, part: int) -> bool:
        """Whether the part is there as it was written, and no fault of the storage was met when it was made."""
        try:
            raw = self.path(part).read_bytes()
        except OSError:
            return False
        if len(raw) != self.num_bytes(part) or hashlib.sha256(raw[DIGEST_BYTES:]).digest() != raw[:DIGEST_BYTES]:
            return False
        reasons = np.frombuffer(raw, f"S{REASON_BYTES}", len(self.rows_of(part)), DIGEST_BYTES)
        return not np.isin(reasons, [reason.encode() for reason in PASSING]).any()

    def write(self, part: int, reasons: list[str], features: Float32[np.ndarray, "n D"]) -> None:
        """Puts the part in its place in one move; features are those of all its rows, also of rows with a reason."""
        assert features.shape == (len(self.rows_of(part)), self.width) and len(reasons) == len(features)
        assert all(len(reason.encode()) <= REASON_BYTES for reason in reasons)
        content = np.array(reasons, f"S{REASON_BYTES}").tobytes() + features.astype("<f4").tobytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.path(part), hashlib.sha256(content).digest() + content)
        open_part.cache_clear()  # it may hold what was there before

    def feature(self, i: int, number: int) -> Float32[np.ndarray, " D"]:
        """That of sample i, of its caption `number` for a text tower; BadSample where it has none."""
        part, row = divmod(self.units.number(i, number), self.part_rows)
        opened = open_part(str(self.path(part)), len(self.rows_of(part)), self.width)
        reason = opened.reasons[row].decode()
        if reason:
            raise BadSample(reason)
        return opened.features[row]
