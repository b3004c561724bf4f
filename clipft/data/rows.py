"""The rows of a source -> one row for each image, with a key; what cannot be used is counted by its reason."""

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL

from clipft.data.building import Building
from clipft.data.fingerprint import REASONS, SEEN, look_at_images
from clipft.data.names import natural
from clipft.data.progress import Progress
from clipft.data.sample import printable
from clipft.data.sources.place import Place, stamp_of, stem_of
from clipft.data.sources.row import Bad, Row, Source, Where
from clipft.data.workers import map_items
from clipft.files import replace_file

SHOWN = 5  # rows named per reason
CHUNK = 256  # images looked at in one go: what is known of them is kept over a kill


@dataclass
class Rows:
    """num_rows is the number of rows of the usable images and of those that are dropped."""

    usable: list[Row] = field(default_factory=list)
    dropped: list[Bad] = field(default_factory=list)
    num_rows: int = 0
    num_repeated: int = 0
    """Rows that only repeat captions of their image."""


def read_rows(source: Source) -> Rows:
    """All rows; those with the same image file, split and label are one, with all their captions.

    Keys are the number of the image in the source and its name, digits enough for all of them. Other columns are those
    of the image's first row.
    """
    rows, known, number = Rows(), dict[tuple[Place, str | None, str | None], Row](), 0
    progress = Progress("reading", "rows")
    for row in source.rows():
        progress.add(1)
        rows.num_rows += 1
        first = known.get((row.image, row.split, row.label)) if isinstance(row, Row) else None
        if isinstance(row, Bad):
            number += 1
            rows.dropped.append(row)
        elif first is not None:
            join(rows, first, row)
        else:
            number += 1
            row.key = str(number)
            if isinstance(row.image, str):
                known[row.image, row.split, row.label] = row
            rows.usable.append(row)
    progress.end()
    width = max(6, len(str(number)))
    for row in rows.usable:
        row.key = "-".join(filter(None, [row.key.zfill(width), readable(stem_of(row.image))]))
    refuse_nothing(source, rows)
    return rows


def join(rows: Rows, first: Row, row: Row) -> None:
    """Gives the captions of a row to the first one of the same image."""
    rows.num_repeated += bool(row.captions) and set(row.captions) <= set(first.captions)
    first.captions += row.captions
    first.where += row.where


def readable(stem: str) -> str:
    """The stem as a key may hold it: no dots, since keys end at the first, and within tar's 100 bytes."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:60]


def look_at_rows(place: Building, rows: list[Row], limit: str | None, deep: bool, workers: int) -> np.ndarray:
    """What is seen of each row's image, a record of type SEEN; what an earlier run has seen is not looked at again."""
    parts = [[row.image for row in rows[start : start + CHUNK]] for start in range(0, len(rows), CHUNK)]
    names = [place.notes / f"seen-{digest_of(part, limit, deep)}.npy" for part in parts]
    for file in set(place.notes.glob("seen-*.npy")) - set(names):
        file.unlink()
    seen = [load_seen(name, len(part)) for name, part in zip(names, parts, strict=True)]
    missing = [n for n, part in enumerate(seen) if part is None]
    chunks = [(names[n], parts[n]) for n in missing]
    sizes = [len(part) for _, part in chunks]
    progress = Progress("looking at", "images", sum(sizes))
    look = partial(look_and_note, limit=limit, deep=deep)
    for n, part in zip(missing, map_items(look, chunks, workers, progress, "workers", sizes), strict=True):
        seen[n] = part
    return np.concatenate([part for part in seen if part is not None])


def digest_of(places: Iterable[Place], limit: str | None, deep: bool) -> str:
    """What changes when one of the images does, or the way they are looked at."""
    digest = hashlib.blake2b(json.dumps([limit, deep, PIL.__version__, str(SEEN)]).encode(), digest_size=16)
    for each in places:
        digest.update(json.dumps(stamp_of(each)).encode())
    return digest.hexdigest()


def look_and_note(chunk: tuple[Path, list[Place]], limit: str | None, deep: bool) -> np.ndarray:
    name, places = chunk
    seen = look_at_images(places, limit, deep)
    file = BytesIO()
    np.save(file, seen, allow_pickle=False)
    replace_file(name, file.getvalue())
    return seen


def load_seen(name: Path, number: int) -> np.ndarray | None:
    with suppress(OSError, ValueError, EOFError):
        seen = np.load(name, allow_pickle=False)
        if seen.dtype == SEEN and seen.shape == (number,):
            return seen
    return None


def leave_out(source: Source, rows: Rows, seen: np.ndarray) -> tuple[Rows, np.ndarray]:
    """The rows whose images can be used, and what is seen of these; the others are dropped with the reason."""
    usable, dropped = [], list(rows.dropped)
    for row, reason in zip(rows.usable, seen["reason"].tolist(), strict=True):
        if reason:
            dropped += [Bad(where, REASONS[reason - 1], row.split) for where in row.where]
        else:
            usable.append(row)
    dropped.sort(key=lambda bad: natural(str(bad.where)))
    rows = Rows(usable, dropped, rows.num_rows, rows.num_repeated)
    refuse_nothing(source, rows)
    return rows, seen[seen["reason"] == 0]


def refuse_nothing(source: Source, rows: Rows) -> None:
    """Raises where no row is left, with the reasons."""
    if rows.usable:
        return
    reasons = "; ".join(f"{reason}: {named(source, where)}" for reason, where in by_reason(rows.dropped).items())
    hints = "".join(
        f"\n{reason}: {source.hints[reason]}" for reason in by_reason(rows.dropped) if reason in source.hints
    )
    raise ValueError(
        f"source={source.name!r}: no row of it can be used ({reasons or 'it is empty'}). A row needs an image file and "
        f"captions, a label, or both.{hints}"
    )


def by_reason(dropped: list[Bad]) -> dict[str, list[Where]]:
    found: dict[str, list[Where]] = {}
    for bad in dropped:
        found.setdefault(bad.reason, []).append(bad.where)
    return found


def named(source: Source, where: list[Where]) -> str:
    """The first of these rows, as one finds them in the source."""
    more = ", ..." if where[SHOWN:] else ""
    names = ", ".join(printable(str(each)) for each in where[:SHOWN])
    if not isinstance(where[0], int):
        return names + more
    return f"{source.table}{'' if len(where) == 1 else 's'} {names}{more}"
