"""What a hostile shard must not reach: other programs, pickles, files outside, all of the memory."""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import png_file, white_tiff
from PIL import Image
from shards import Members, jpeg, write_tar

from clipft.data.augment import Augment
from clipft.data.caption import captions_of, group_of
from clipft.data.decode import decode_rgb
from clipft.data.index import index_shards
from clipft.data.loader import eval_images, train_loader
from clipft.data.order import Shuffle
from clipft.data.pairs import build_units
from clipft.data.sample import BadSample

pytestmark = [pytest.mark.process, pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")]
MAX_PIXELS = 64_000_000
PROGRAMS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "socket.connect")
CODE = ("pickle.find_class",)


def in_child(work: Callable[[], Any]) -> Any:
    """What the function gives, as JSON, in a process of its own, which an audit hook cannot leave again."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(send, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def watched(work: Callable[[], Any]) -> list[list[str]]:
    """What the function does in a child to start programs, run code from files, or write files."""
    seen = []

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event.startswith(PROGRAMS + CODE) or writes:
            seen.append([event, str(args[0])])

    def run() -> list[list[str]]:
        sys.dont_write_bytecode = True
        sys.addaudithook(hook)
        work()
        return seen

    return in_child(run)


class Sentinel:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def code_members(sentinel: Path) -> Members:
    """Members that decoders of webdataset, torch and numpy run as code."""
    pickled = pickle.dumps(Sentinel(sentinel))
    array, weights = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Sentinel(sentinel)], dtype=object), allow_pickle=True)
    torch.save(Sentinel(sentinel), weights)
    by_kind = {kind: pickled for kind in ("pyd", "pkl", "pickle", "pt", "joblib", "py", "so")}
    by_kind |= {"npy": array.getvalue(), "npz": array.getvalue(), "pth": weights.getvalue(), "ten": pickled}
    return [(f"00000.{kind}", raw) for kind, raw in [("jpg", jpeg(0)), ("txt", b"a dog"), *by_kind.items()]] + [
        ("00001.jpg", pickled),
        ("00001.json", pickled),
        ("00002.jpg", jpeg(2)),
        ("00002.txt", pickled),
    ]


def read_all(shard: str) -> None:
    """Reads a shard in every way that we have."""
    samples = index_shards([shard])
    for i in range(len(samples)):
        samples.read(i, tuple(samples.kinds))
    options: dict[str, Any] = {"max_pixels": MAX_PIXELS, "positives": "group", "group": "product", "seed": 0}
    options |= {"num_steps": 1, "rank": 0, "world": 1, "start_step": 0, "workers": 0, "pin": False}
    for text_errors in ("strict", "replace"):
        batch = next(
            iter(
                train_loader(
                    build_units(samples, "one"),
                    augment=Augment(16, 1.0, 0.0, 0.0, "bicubic", "shortest", (0, 0, 0)),
                    tokenize=lambda texts: torch.zeros(len(texts), 4, dtype=torch.long),
                    order=Shuffle(0, len(samples), len(samples)),
                    text_errors=text_errors,
                    **options,
                )
            )
        )
        assert batch.valid.any()
    list(eval_images(samples, lambda image: torch.zeros(3, 1, 1), MAX_PIXELS, 0, [np.arange(len(samples))]))


def test_pickles_and_code_in_a_shard_are_never_run(tmp_path: Path):
    sentinel = tmp_path / "sentinel"
    shard = write_tar(tmp_path / "shards/a.tar", code_members(sentinel))
    events = watched(lambda: read_all(shard))
    assert not sentinel.exists()
    assert {event for event, _ in events} <= {"open"}
    assert all(Path(path).parent == tmp_path / "shards" for _, path in events), "only the index is written"


def test_the_watch_sees_a_pickle_that_runs(tmp_path: Path):
    raw = pickle.dumps(Sentinel(tmp_path / "sentinel"))
    assert {event for event, _ in watched(lambda: pickle.loads(raw))} >= {"pickle.find_class"}
    assert (tmp_path / "sentinel").exists()


def test_names_that_point_elsewhere_are_keys_and_never_written(tmp_path: Path):
    home = tmp_path / "a/b/c"
    names = ["../../../up", f"{tmp_path}/absolute", "../b/c/same", "~/home", "C:\\drive"]
    members = [(f"{name}.{kind}", jpeg(0) if kind == "jpg" else b"a dog") for name in names for kind in ("jpg", "txt")]
    shard = write_tar(home / "a.tar", members)
    with tarfile.open(shard, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    assert watched(lambda: read_all(shard)) != []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.tar", "a.tar.index.json", "b", "c"]
    samples = index_shards([shard])
    assert len(samples) == len(names) and samples.ignored == {"not_a_plain_file": 2}
    assert captions_of(samples.read(0)) == ["a dog"]


def eps() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "EPS")
    return file.getvalue()


FOREIGN = {
    "eps": eps(),
    "dos eps": struct.pack("<IIIIIII", 0xC6D3D0C5, 32, len(eps()), 0, 0, 0, 0).ljust(32, b"\0") + eps(),
    "postscript": b"%!PS\n(sentinel) (w) file closefile\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "magick": b"push graphic-context\nviewbox 0 0 9 9\nimage over 0,0 0,0 'https://x/\"|touch sentinel\"'\n",
    "psd": b"8BPS\0\1" + bytes(100),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "zip": b"PK\3\4" + bytes(100),
    "heic": b"\0\0\0\x18ftypheic" + bytes(100),
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "shell": b"#!/bin/sh\ntouch sentinel\n",
}


def test_other_formats_under_the_name_of_a_picture_start_no_program_and_are_dropped_with_the_reason():
    def decode_all() -> None:
        for raw in FOREIGN.values():
            with pytest.raises(BadSample, match="format_not_allowed"):
                decode_rgb(raw, MAX_PIXELS)

    assert watched(decode_all) == []


def test_the_watch_sees_the_program_that_pillow_starts_for_an_eps():
    def by_pillow() -> None:
        with Image.open(io.BytesIO(eps())) as image, pytest.raises(OSError):
            image.load()

    assert "subprocess.Popen" in [event for event, _ in watched(by_pillow)]


def peak_mb(work: Callable[[], Any]) -> float:
    """By how much the function raises the resident memory of a process at its highest."""

    def high() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    def run() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
        before = high()
        work()
        return (high() - before) / 1024

    return in_child(run)


def gif(screen: int, frame: int) -> bytes:
    """A GIF whose frame may be larger than its screen."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\2\2\x44\1\0;"


def jpeg_of(side: int) -> bytes:
    """A small JPEG whose header claims another size."""
    raw = bytearray(jpeg(0))
    place = raw.index(b"\xff\xc0")
    raw[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(raw)


SIDE = 20_000
BOMBS = {
    "png": png_file(SIDE, SIDE, 8, 2, bytes(10_000_000)),
    "whole png of one bit": png_file(SIDE, SIDE, 1, 0, (b"\0" + bytes(SIDE // 8)) * SIDE),
    "whole tiff": white_tiff(SIDE),
    "tiff cut from a tile": white_tiff(64, tile=2 * SIDE),
    "jpeg": jpeg_of(SIDE),
    "gif": gif(SIDE, 1),
    "gif larger than its screen": gif(1, SIDE),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc/self/clear_refs")
@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_claims_400_million_pixels_takes_no_memory(name: str):
    raw = BOMBS[name]
    assert len(raw) < 50_000

    def decode() -> None:
        with pytest.raises(BadSample, match="too_large"):
            decode_rgb(raw, MAX_PIXELS)

    assert peak_mb(decode) < 50


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc/self/clear_refs")
def test_the_memory_that_is_measured_is_that_of_the_work():
    assert 90 < peak_mb(lambda: len(b"x" * (100 << 20))) < 110


def test_json_of_any_depth_is_a_bad_sample():
    for raw in (b"[" * 10**6, b'{"a":' * 10**5, b'{"caption": ' + b"9" * 10**5 + b"}"):
        for read in (captions_of, lambda members: group_of(members, "product")):
            with pytest.raises(BadSample, match="bad_json"):
                read({"json": raw})
