"""Where the paths of a table lead: a downloaded list must not name other files of the machine."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clipft.data.sample import BadSample
from clipft.data.sources.columns import URL

PROBED = 20  # rows by which the folder of the images is found


@dataclass(frozen=True)
class Base:
    """Folders as absolute paths."""

    start: str
    """Relative paths start here."""
    limit: str
    """No path may leave it."""
    table: str
    """Folder of the table: where the user named a root, paths that leave it may also start here."""


def resolve(base: Base, value: Any) -> tuple[str, str]:
    """The absolute path that a cell names, and the same from the base on."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadSample("no_image")
    text = value.strip()
    if URL.match(text):
        raise BadSample("image_url")
    if "\\" in text and "/" not in text:
        text = text.replace("\\", "/")
    if text.startswith("~"):
        text = os.path.expanduser(text)
    for start in (base.start, base.table):
        path = os.path.normpath(os.path.join(start, text))
        if is_inside(path, base.limit):
            inside = is_inside(path, base.start)
            return path, path[len(base.start.rstrip("/")) + 1 :] if inside else os.path.relpath(path, base.start)
    raise BadSample("image_outside_source")


def is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def leads_out(path: str, limit: str) -> bool:
    """Whether a link on the way to the file leads out of the folder."""
    if os.path.islink(path):
        return not is_inside(os.path.realpath(path), real(limit))
    return not is_inside(os.path.join(real(os.path.dirname(path)), os.path.basename(path)), real(limit))


@lru_cache(65536)
def real(folder: str) -> str:
    return os.path.realpath(folder)


def find_base(table: Path, source: Path, root: str | None, names: Iterable[Any]) -> Base:
    """The folder that the table's relative paths start from: its own, else the only one around it that has the images.

    `source` is what the user named: the folders in it are looked at, no others.
    """
    own = os.path.abspath(table.parent)
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ValueError(f"root={root!r} is no folder.")
        return Base(os.path.abspath(folder), os.path.abspath(folder), own)
    limit = os.path.abspath(source) if source.is_dir() else own
    asked = [name.strip().replace("\\", "/") for name in names if isinstance(name, str)][:PROBED]
    asked = [name for name in asked if not name.startswith(("/", "~", "..")) and not URL.match(name)]
    if not asked or holds_any(own, asked):
        return Base(own, limit, own)
    around = {limit, *subfolders(own), *subfolders(limit)} - {own}
    found = sorted(folder for folder in around if holds_any(folder, asked))
    if not found:  # images/train2017
        deeper = {inner for folder in around - {limit} for inner in subfolders(folder)} - around
        found = sorted(folder for folder in deeper if holds_any(folder, asked))
    if len(found) > 1:
        choices = " or ".join(f"root={folder}" for folder in found[:4])
        raise ValueError(f"{table}: its images ({asked[0]}, ...) lie in several folders. Decide: {choices}.")
    return Base(found[0] if found else own, limit, own)


def subfolders(folder: str) -> list[str]:
    """The folders in it; none where it may not be looked into."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return [path for path in paths if os.path.isdir(path)]


def holds_any(folder: str, names: list[str]) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)
