"""The small files of a packed set: shards.json has its shards by split, with their samples, bytes and checksums."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.files import replace_file

MANIFEST = "shards.json"
CLASSNAMES = "classnames.txt"  # both files as CLIP_benchmark lays them out
TEMPLATES = "zeroshot_classification_templates.txt"
SMALL_FILES = (MANIFEST, CLASSNAMES, TEMPLATES)
AGAIN = "Copy the folder again or pack it again (clipft data pack)."


@dataclass(frozen=True)
class Listed:
    """A shard as shards.json describes it; nothing says that it is there, or still the same."""

    path: Path
    bytes: int
    sha256: str
    samples: int


def listed_shards(folder: Path) -> dict[str, list[Listed]]:
    """What shards.json of a packed folder lists, by split, also splits of other names than ours."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["version"] != 1:
            raise ValueError(f"version {manifest['version']!r}, this clipft reads version 1")
        return {
            split: [
                Listed(folder / each["name"], each["bytes"], each["sha256"], each["samples"])
                for each in entry["shards"]
            ]
            for split, entry in manifest["splits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of shards ({error!r}). {AGAIN}") from error


def listed_beside(paths: Iterable[str]) -> dict[str, Listed]:
    """What the shards.json of each shard's folder, or of the one above it, says about the shard."""
    paths = list(paths)
    folders = {folder for path in paths for folder in list(Path(path).parents)[:2] if (folder / MANIFEST).is_file()}
    known = {}
    for folder in folders:
        known |= {str(each.path): each for entries in listed_shards(folder).values() for each in entries}
    return {path: known[path] for path in paths if path in known}


def write_manifest(folder: Path, name: str, splits: dict[str, dict[str, Any]], more: dict[str, Any]) -> None:
    """Write shards.json: of each split its `shards` (name, samples, bytes, sha256) in their order, with their sums."""
    whole = {
        split: {
            "shards": entry["shards"],
            "samples": sum(shard["samples"] for shard in entry["shards"]),
            "bytes": sum(shard["bytes"] for shard in entry["shards"]),
            **{key: value for key, value in entry.items() if key != "shards"},
        }
        for split, entry in splits.items()
    }
    text = json.dumps({"version": 1, "name": name, "splits": whole, **more}, indent=1)
    replace_file(folder / MANIFEST, text + "\n")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
