"""What a source is, by looking at it."""

import glob
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from clipft.data.manifest import MANIFEST
from clipft.data.names import SPLIT_OF, natural
from clipft.data.sample import IMAGE_KINDS
from clipft.data.sources.csvs import csv_source
from clipft.data.sources.folders import folder_source
from clipft.data.sources.huggingface import huggingface_source
from clipft.data.sources.jsons import json_source, jsonl_source
from clipft.data.sources.parquets import parquet_source
from clipft.data.sources.row import Ask, Source
from clipft.data.sources.tables import Part, split_in, split_name
from clipft.data.sources.tars import tar_source
from clipft.data.split import nearest

FORMAT_OF = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
FORMAT_OF |= {".parquet": "parquet"}
OPEN: dict[str, Callable[[Ask, list[Part]], Source]] = {
    "csv": csv_source,
    "jsonl": jsonl_source,
    "json": json_source,
    "parquet": parquet_source,
}
IMAGES = tuple(f".{kind}" for kind in IMAGE_KINDS)
METADATA = tuple(f"metadata{suffix}" for suffix in FORMAT_OF)  # the names that Hugging Face's image folders use
CAPTION_FILES = ("captions.txt", "*.token.txt")  # of Flickr8k and Flickr30k
OTHER_COCO = ("instances_*.json", "person_keypoints_*.json", "stuff_*.json", "panoptic_*.json", "image_info_*.json")
TABLE_FOLDERS = ("", "data", "annotations")  # beside the images, as on the Hub, as in COCO
KINDS = (
    "a folder with metadata.jsonl or metadata.csv, one CSV, TSV, JSONL, JSON or Parquet table, images with texts of "
    "the same name, a folder per class, or WebDataset tars; or one such table; or a folder of datasets.save_to_disk"
)


def open_source(ask: Ask) -> Source:
    """The source with its format found by looking, or as format= says; nothing but its head is read."""
    path = Path(ask.source).expanduser()
    if path.is_dir():
        return open_folder(ask, path)
    if ask.format == "tars" or (ask.format is None and path.suffix == ".tar"):
        return tar_source(ask, path)
    files = [path] if path.is_file() else pattern_files(ask.source)
    if not files:
        if re.match(r"[a-z0-9+]+://", ask.source):
            raise ValueError(
                f"source={ask.source!r}: sources are read from local files. Download it and give its path."
            )
        raise ValueError(f"source={ask.source!r} does not exist. Expected {KINDS}. {nearest(path)}")
    return open_tables(ask, parts_of(files), ask.format)


def pattern_files(pattern: str) -> list[Path]:
    expanded = os.path.expanduser(pattern)
    return [Path(name) for name in sorted(glob.glob(expanded, recursive=True), key=natural) if os.path.isfile(name)]


def open_tables(ask: Ask, parts: list[Part], form: str | None) -> Source:
    """The tables as one source; all of them have to be of one format."""
    forms = {FORMAT_OF.get(part.path.suffix.lower(), "csv" if part.path.suffix == ".txt" else "") for part in parts}
    form = form or (forms.pop() if len(forms) == 1 else "")
    if form not in OPEN:
        names = ", ".join(part.path.name for part in parts[:4])
        raise ValueError(
            f"source={ask.source!r} ({names}) is not one kind of table. Expected {', '.join(FORMAT_OF)} or .txt; save "
            "a spreadsheet as CSV, unpack what is compressed, or say what it is: format=csv or another."
        )
    return OPEN[form](ask, parts)


def parts_of(files: list[Path], folders: bool = False) -> list[Part]:
    """The tables with the splits that their names or folders say; the name of a single one says none."""
    if folders:
        return [Part(file, split_name(file.parent.name)) for file in files]
    return [Part(files[0])] if len(files) == 1 else [Part(file, split_in(file.stem)) for file in files]


def open_folder(ask: Ask, folder: Path) -> Source:
    """The one thing that a folder is; where it could be several, the candidates and how to decide."""
    if ask.format in ("pairs", "classes"):
        return folder_source(ask, folder)
    if ask.format == "huggingface" or (ask.format is None and is_saved_dataset(folder)):
        return huggingface_source(ask, folder)
    if ask.format == "tars" or (ask.format is None and (folder / MANIFEST).is_file()):
        return tar_source(ask, folder)
    tables = find_tables(folder)
    if ask.format is None and has_tars(folder):
        if tables:
            choices = " or ".join(["format=tars", *(f"source={parts[0].path}" for parts in tables.values())])
            raise ValueError(f"source={ask.source!r} holds tars and tables ({', '.join(tables)}). Decide: {choices}.")
        return tar_source(ask, folder)
    if ask.format is not None:
        tables = {name: parts for name, parts in tables.items() if format_of(parts) == ask.format}
        if not tables:
            raise ValueError(f"source={ask.source!r} holds no table for format={ask.format}. Name the file as source=.")
    if len(tables) > 1:
        choices = " or ".join(f"source={parts[0].path} root={folder}" for parts in tables.values())
        raise ValueError(f"source={ask.source!r} holds several tables ({', '.join(tables)}). Decide: {choices}.")
    for parts in tables.values():
        return open_tables(ask, parts, ask.format)
    return folder_source(ask, folder)


def format_of(parts: list[Part]) -> str:
    return FORMAT_OF.get(parts[0].path.suffix.lower(), "csv")


def is_saved_dataset(folder: Path) -> bool:
    """Whether datasets.save_to_disk wrote the folder."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def has_tars(folder: Path) -> bool:
    inner = [folder / name for name in os.listdir(folder) if name.lower() in SPLIT_OF]
    return any(any(place.glob("*.tar")) for place in [folder, *inner])


def find_tables(folder: Path) -> dict[str, list[Part]]:
    """The tables of a folder by name; tables that only differ in their split are one. metadata.* goes before others."""
    for name in METADATA:
        if (folder / name).is_file():
            return {name: parts_of([folder / name])}
        inner = [place / name for place in sorted(folder.iterdir()) if place.name.lower() in SPLIT_OF]
        if any(file.is_file() for file in inner):
            return {name: parts_of([file for file in inner if file.is_file()], folders=True)}
    found: dict[str, list[Path]] = {}
    for inner in TABLE_FOLDERS:
        for file in tables_in(folder / inner):
            found.setdefault(without_split(file), []).append(file)
    return {", ".join(file.name for file in files[:3]): parts_of(files) for files in found.values()}


def tables_in(folder: Path) -> list[Path]:
    """The files there that may be tables: no texts of images, no lists of img2dataset, no hidden files."""
    names = sorted(os.listdir(folder), key=natural) if folder.is_dir() else []
    known = set(names)
    images = {name.rpartition(".")[0] for name in names if name.lower().endswith(IMAGES)}
    files = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        listed = suffix.lower() in FORMAT_OF and not {f"{stem}_stats.json", f"{stem}.tar"} & known
        listed = listed and not name.endswith(("_stats.json", ".tar.index.json"))
        wanted = any(fnmatch(name, pattern) for pattern in CAPTION_FILES) or (listed and stem not in images)
        if wanted and not name.startswith((".", "_")) and (folder / name).is_file():
            files.append(folder / name)
    if any(fnmatch(file.name, "captions_*.json") for file in files):
        return [file for file in files if not any(fnmatch(file.name, pattern) for pattern in OTHER_COCO)]
    return files


def without_split(file: Path) -> str:
    """The name of the table without split and numbers: by it the parts of one table are known."""
    words = [word for word in re.split(r"[-_. ]", file.stem.lower()) if word]
    kept = [word for word in words if re.sub(r"[0-9]+$", "", word) not in (*SPLIT_OF, "", "of")]
    return "-".join([*kept, file.suffix.lower()])
