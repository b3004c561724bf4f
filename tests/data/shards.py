"""Small shards for the tests of clipft.data, written with tarfile alone."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from clipft.data.index import load_index
from clipft.data.manifest import sha256_of, write_manifest

Members = list[tuple[str, bytes]]


def jpeg(seed: int, height: int = 20, width: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return str(path)


def pairs(first: int, count: int) -> Members:
    """Members of samples numbered from `first` on: an image, and two captions that name the number."""
    members: Members = []
    for i in range(first, first + count):
        members += [(f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.txt", f"picture {i}\nnumber {i}\n".encode())]
    return members


def write_shards(folder: Path, *counts: int, prefix: str = "") -> list[str]:
    """One shard for each count; the samples are numbered through."""
    firsts = np.cumsum([0, *counts]).tolist()
    return [write_tar(folder / f"{prefix}{n:03d}.tar", pairs(firsts[n], count)) for n, count in enumerate(counts)]


def list_shards(folder: Path, shards: dict[str, list[Path]]) -> None:
    """shards.json beside shards, as packing writes it."""
    splits = {
        split: {
            "shards": [
                {
                    "name": path.relative_to(folder).as_posix(),
                    "samples": len(load_index(path).keys),
                    "bytes": path.stat().st_size,
                    "sha256": sha256_of(path),
                }
                for path in paths
            ]
        }
        for split, paths in shards.items()
    }
    write_manifest(folder, folder.name, splits, {})
