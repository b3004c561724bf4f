"""A folder with metadata.jsonl and images -> WebDataset shards with their indexes and shards.json."""

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipft.config import PackConfig
from clipft.data.caption import CAPTION_COLUMNS, caption_list, captions_in, parse_json
from clipft.data.decode import image_extension
from clipft.data.index import write_index
from clipft.data.manifest import MANIFEST, write_manifest
from clipft.data.sample import BadSample
from clipft.data.split import CLASSNAMES, SPLIT_OF, SPLITS, TEMPLATES

METADATA = "metadata.jsonl"
IMAGE_COLUMNS = ("image", "file_name", "filepath", "path")
SMALL_FILES = (MANIFEST, CLASSNAMES, TEMPLATES)  # the first has the shards' hashes: equal ones, equal sets
SHOWN_LINES = 5  # line numbers named per reason in the summary


@dataclass(frozen=True)
class Row:
    """A sample to pack."""

    key: str
    split: str
    label: str | None
    image: Path | bytes
    """A file is read when its shard is written."""
    extension: str
    num_captions: int
    members: dict[str, bytes]
    """json, and txt where there are captions."""


@dataclass(frozen=True)
class Packed:
    """What lies in the shards, and which lines of metadata.jsonl do not."""

    out: str
    shards: dict[str, int]
    samples: dict[str, int]
    captions: dict[str, int]
    classnames: list[str]
    dropped: dict[str, list[int]]
    """Reason -> line numbers."""


def pack(config: PackConfig) -> Packed:
    """Write the usable rows of source as shards into out, which appears in one move; says what was left out.

    The same source gives the same bytes: packing again changes nothing. An out with other content is refused.
    """
    refuse_foreign(config.out)
    rows, dropped = read_rows(config.source)
    return replace(write_set(config.out, rows, config.shard_samples, config.templates), dropped=dropped)


def write_set(out: str, rows: list[Row], shard_samples: int, templates: list[str]) -> Packed:
    """Write the rows as the packed folder `out`, in one move; templates only where there are labels."""
    # Absolute, since "." has no name to build beside.
    folder = Path(os.path.abspath(Path(out).expanduser()))
    parts = by_split(rows)
    classnames = class_order({row.label for row in rows if row.label is not None})
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True)
        shards = {split: write_split(building, split, part, classnames, shard_samples) for split, part in parts.items()}
        if classnames:
            write_lines(building / CLASSNAMES, classnames)
            write_lines(building / TEMPLATES, templates)
        sizes = {path.name: count for written in shards.values() for path, count in written.items()}
        write_manifest(building, folder.name, {split: list(written) for split, written in shards.items()}, sizes)
        move_into_place(out, building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Packed(
        out=out,
        shards={split: len(written) for split, written in shards.items()},
        samples={split: len(part) for split, part in parts.items()},
        captions={split: sum(row.num_captions for row in part) for split, part in parts.items()},
        classnames=classnames,
        dropped={},
    )


def describe(packed: Packed) -> str:
    """A table with one line per split, then every reason for which rows were left out, with their lines."""
    lines = [f"{'split':<10} {'shards':>7} {'samples':>9} {'captions':>9}"]
    for split, samples in packed.samples.items():
        lines.append(f"{split:<10} {packed.shards[split]:>7} {samples:>9,} {packed.captions[split]:>9,}")
    if packed.classnames:
        lines.append(f"{len(packed.classnames)} classes")
    for reason, where in packed.dropped.items():
        lines.append(f"left out: {len(where)} {reason} ({named_lines(where)})")
    return "\n".join([*lines, f"packed into {packed.out}"])


def named_lines(where: list[int]) -> str:
    more = ", ..." if where[SHOWN_LINES:] else ""
    word = "line" if len(where) == 1 else "lines"
    return f"{METADATA} {word} {', '.join(map(str, where[:SHOWN_LINES]))}{more}"


def refuse_foreign(name: str) -> None:
    """Raise when out holds files that no packing put there."""
    out = Path(name).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={name!r} is a file. Choose a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ValueError(f"out={name!r} is not empty and holds no {MANIFEST}. Choose a folder that does not exist yet.")


def move_into_place(name: str, building: Path, out: Path) -> None:
    """Give the finished folder its name, unless the same already has it."""
    try:
        os.rename(building, out)  # also onto an empty folder
    except OSError:
        if not (out / MANIFEST).is_file():
            raise
        differing = [file for file in SMALL_FILES if content(building / file) != content(out / file)]
        if differing:
            raise ValueError(
                f"out={name!r} holds another packed set ({differing[0]} differs). Remove it or choose another out."
            ) from None


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def read_rows(name: str) -> tuple[list[Row], dict[str, list[int]]]:
    """Usable rows in the order of the file, and the lines of the others by reason; none usable raises."""
    source = Path(name).expanduser()
    columns, dropped = read_metadata(name, source)
    image_column = next((c for c in IMAGE_COLUMNS if any(c in row for row in columns.values())), None)
    if columns and image_column is None:
        found = ", ".join(sorted({column for row in columns.values() for column in row}))
        raise ValueError(
            f"source={name!r}: {METADATA} has no column for the image. Expected one of "
            f"{', '.join(IMAGE_COLUMNS)}; found {found}."
        )
    width = max(6, len(str(max(columns, default=0))))
    rows = []
    for line, row in columns.items():
        try:
            rows.append(read_row(source, row, str(image_column), f"{line:0{width}d}"))
        except BadSample as bad:
            dropped.setdefault(bad.reason, []).append(line)
    if not rows:
        reasons = "; ".join(f"{reason}: {named_lines(where)}" for reason, where in dropped.items())
        raise ValueError(
            f"source={name!r}: no row of {METADATA} can be used ({reasons or 'it is empty'}). "
            'Expected lines such as {"image": "images/1.jpg", "captions": ["a red ball"], "split": "train"}.'
        )
    return rows, dropped


def read_metadata(name: str, source: Path) -> tuple[dict[int, dict[str, Any]], dict[str, list[int]]]:
    """Objects by line number (from 1), and the lines that hold none by reason; blank lines are nothing."""
    if not (source / METADATA).is_file():
        raise ValueError(
            f"source={name!r} holds no {METADATA}. Expected a folder with {METADATA} (one row per image) "
            "and the images that it names."
        )
    rows, dropped = {}, {}
    with open(source / METADATA, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = parse_json(raw)
                if not isinstance(row, dict):
                    raise BadSample("not_an_object")
                rows[line] = row
            except BadSample as bad:
                dropped.setdefault(bad.reason, []).append(line)
    return rows, dropped


def read_row(source: Path, row: dict[str, Any], image_column: str, number: str) -> Row:
    """The row with its image's header looked at; BadSample where nothing can be learnt from it."""
    image = image_path(source, row.get(image_column))
    try:
        extension = image_extension(image)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadSample("image_missing") from error
    except OSError as error:
        raise BadSample("image_unreadable") from error
    captions, label = captions_in(row), label_of(row)
    if not captions and label is None:
        raise BadSample("no_caption_or_label")
    return Row(
        key="-".join(filter(None, [number, readable(image.stem)])),
        split=split_of(row),
        label=label,
        image=image,
        extension=extension,
        num_captions=len(captions),
        members=text_members(row, captions),
    )


def image_path(source: Path, value: Any) -> Path:
    """The image's path, which has to lie inside source: a downloaded list must not name other files."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadSample("no_image")
    root = os.path.abspath(source)
    path = os.path.normpath(os.path.join(root, value))
    if os.path.commonpath([root, path]) != root:
        raise BadSample("image_outside_source")
    return Path(path)


def readable(stem: str) -> str:
    """The stem as a key may hold it: no dots, since keys end at the first, and within tar's 100 bytes."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:60]


def split_of(row: dict[str, Any]) -> str:
    """The row's split; dev and the like are val, other names stay, none is train."""
    value = str(row.get("split") or "train").strip().lower()
    return SPLIT_OF.get(value) or readable(value) or "train"


def label_of(row: dict[str, Any]) -> str | None:
    value = row.get("label")
    if value is not None and not isinstance(value, (str, int)):
        raise BadSample("bad_label")
    return None if value is None else " ".join(str(value).split()) or None


def class_order(labels: set[str]) -> list[str]:
    """Labels in class order: by number where all are numbers, else by text."""
    if all(re.fullmatch("[0-9]+", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def text_members(row: dict[str, Any], captions: list[str]) -> dict[str, bytes]:
    """json with the captions and all other columns; txt with a caption per line."""
    used = next((column for column in CAPTION_COLUMNS if caption_list(row.get(column))), "captions")
    rest = {column: value for column, value in row.items() if column not in (used, "captions")}
    if captions:
        rest = {"captions": captions, **rest}
    try:
        members = {"json": json.dumps(rest, ensure_ascii=False).encode()}
        if captions:
            members["txt"] = "".join(" ".join(caption.split()) + "\n" for caption in captions).encode()
    except UnicodeEncodeError as error:  # lone surrogates from JSON escapes
        raise BadSample("bad_utf8") from error
    return members


def by_split(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by split; train, val and test first, then the others by name."""
    found = {row.split for row in rows}
    order = [split for split in SPLITS if split in found] + sorted(found - set(SPLITS))
    return {split: [row for row in rows if row.split == split] for split in order}


def write_split(
    folder: Path, split: str, rows: list[Row], classnames: list[str], shard_samples: int
) -> dict[Path, int]:
    """The shards with their numbers of samples, which differ by at most one; row order is kept."""
    number_of = {label: number for number, label in enumerate(classnames)}
    count = -(-len(rows) // shard_samples)
    shards = {}
    for n in range(count):
        part = rows[n * len(rows) // count : (n + 1) * len(rows) // count]
        path = folder / f"{split}-{n:05d}.tar"
        write_shard(path, part, number_of)
        write_index(path)
        shards[path] = len(part)
    return shards


def write_shard(path: Path, rows: list[Row], number_of: dict[str, int]) -> None:
    """One tar whose bytes depend on the rows alone."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    with (
        open(path, "wb") as file,
        TarWriter(file, user="clipft", group="clipft", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        for row in rows:
            members = {row.extension: image_bytes(row.image), **row.members}
            if row.label is not None:
                members["cls"] = str(number_of[row.label]).encode()
            tar.write({"__key__": row.key, **members})


def image_bytes(image: Path | bytes) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
