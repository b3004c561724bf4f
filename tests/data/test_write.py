"""Shards while they are written: images scaled down, kills survived, others waited for."""

import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forms import bytes_of, captioned, jsonl, labelled, picture, read, run
from PIL import Image

from clipft.cli import main
from clipft.config import DrawConfig, ImageConfig
from clipft.data import rows, write
from clipft.data.building import building
from clipft.data.decode import decode_rgb
from clipft.report import RunFailed


def photo(width: int, height: int, kind: str = "JPEG", **options) -> bytes:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    file = io.BytesIO()
    Image.fromarray(np.repeat(ramp, 3, axis=2).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def source_of(folder: Path, **raws: bytes) -> Path:
    folder.mkdir()
    for name, raw in raws.items():
        (folder / f"{name}.jpg").write_bytes(raw)
    rows = [{"image": f"{name}.jpg", "caption": name} for name in raws]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_larger_images_are_scaled_to_the_shorter_side_and_others_keep_their_bytes(tmp_path: Path):
    raws = {
        "wide": photo(300, 120),
        "high": photo(90, 200, "PNG"),
        "exact": photo(64, 500),
        "small": photo(20, 30, "PNG"),
    }
    run(source_of(tmp_path / "source", **raws), tmp_path / "out", image=config(64))
    samples = {sample["__key__"].partition("-")[2]: sample for sample in read(tmp_path / "out")}
    assert samples["exact"]["jpg"] == raws["exact"] and samples["small"]["png"] == raws["small"]
    for name, size in (("wide", (160, 64)), ("high", (64, 142))):
        with Image.open(io.BytesIO(samples[name]["jpg"])) as image:
            assert image.size == size and image.format == "JPEG"
        small = np.asarray(Image.fromarray(decode_rgb(raws[name], 10**6)).resize(size, Image.Resampling.BICUBIC), float)
        assert np.abs(decode_rgb(samples[name]["jpg"], 10**6) - small).mean() < 1.5


def config(max_size: int, quality: int | None = None) -> ImageConfig:
    return ImageConfig(max_size=max_size, quality=quality)


def test_a_scaled_image_is_upright_and_lower_quality_is_smaller(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = source_of(tmp_path / "source", a=photo(300, 120, exif=exif), b=picture(0, size=(200, 200)))
    run(source, tmp_path / "out", image=config(64))
    run(source, tmp_path / "poor", image=config(64, 20))
    fine, poor = read(tmp_path / "out"), read(tmp_path / "poor")
    with Image.open(io.BytesIO(fine[0]["jpg"])) as image:
        assert image.size == (64, 160) and not image.getexif()
    assert len(poor[1]["jpg"]) < len(fine[1]["jpg"]) / 2


def test_a_large_image_that_cannot_be_decoded_keeps_its_bytes_and_is_named(tmp_path: Path):
    cut = photo(300, 300, "PNG")[:-200]
    report = run(source_of(tmp_path / "source", cut=cut, fine=photo(300, 300)), tmp_path / "out", image=config(64))
    assert report.packed.splits["train"][0].not_scaled == {"image_truncated": ["000001-cut"]}
    assert read(tmp_path / "out")[0]["png"] == cut


def test_a_finished_shard_is_kept_and_one_of_other_rows_is_written_again(tmp_path: Path, monkeypatch):
    source = jsonl(tmp_path / "source", labelled())
    run(source, tmp_path / "out", shard_samples=2)
    written = []
    original = write.write_shard

    def stop_after_two(path, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return original(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "write_shard", stop_after_two)
        run(source, tmp_path / "again/out", shard_samples=2)
    assert not (tmp_path / "again/out").exists()
    place = tmp_path / "again/.out.building"
    (place / "set/.train-00002.tar.tmp").write_bytes(b"half")
    (place / "set/extra-00000.tar").write_bytes(b"of another plan")
    (source / "0.jpg").write_bytes(picture(100))  # a row of the first shard
    (source / "0.jpg").write_bytes(labelled()[0].raw)  # the same bytes under another time: looked at anew
    later, names = [], []
    monkeypatch.setattr(write, "write_shard", lambda path, *rest: later.append(path.name) or original(path, *rest))
    run(source, tmp_path / "again/out", shard_samples=2)
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert written == ["train-00000.tar", "train-00001.tar"]
    assert sorted(later) == sorted(set(names) - {"train-00001.tar"})
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again/out") and not place.exists()


def test_a_full_disk_is_named_and_what_is_finished_is_kept(tmp_path: Path, monkeypatch, capsys):
    source = jsonl(tmp_path / "source", labelled())
    replace = os.replace

    def full(old, new):
        if str(new).endswith("train-00001.tar"):
            raise OSError(28, "No space left on device")
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"train-00001\.tar could not be written \(No"):
        patch.setattr(os, "replace", full)
        run(source, tmp_path / "out", shard_samples=2)
    assert (tmp_path / ".out.building/set/train-00000.tar").exists() and not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert main(["data", "pack", f"source={source}", f"out={tmp_path}/out", "shard_samples=2", "workers=0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "No space left" in said and "Error executing job" not in said
    run(source, tmp_path / "out", shard_samples=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_full_disk_fails_the_packing_also_where_no_shard_is_written(tmp_path: Path):
    with (
        pytest.raises(RunFailed, match=r"/x: No space left.*Run the same command again"),
        building(str(tmp_path / "o")),
    ):
        raise OSError(28, "No space left on device", "/x")
    assert (tmp_path / ".o.building").exists()


def test_a_second_process_waits_for_the_first(tmp_path: Path, capsys):
    order = []

    def second():
        with building(str(tmp_path / "out")):
            order.append("second")

    with building(str(tmp_path / "out")):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and "waiting for another process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_user_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(ValueError), building(str(tmp_path / "out")) as place:
        (place.set / "x").touch()
        raise ValueError
    with pytest.raises(KeyboardInterrupt), building(str(tmp_path / "out")) as place:
        (place.set / "x").touch()
        raise KeyboardInterrupt
    with building(str(tmp_path / "out")) as place:
        assert (place.set / "x").exists()
    assert list(tmp_path.iterdir()) == []


def large_source(folder: Path, num: int, size: tuple[int, int] = (420, 360)) -> Path:
    return source_of(folder, **{f"n{i}": picture(i, size=size) for i in range(num)})


def fork(work: Callable[[], Any]) -> int:
    """The process that does the work; importing everything anew would take longer than the work."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
def test_killed_at_any_time_and_run_again_it_ends_with_the_same_bytes(tmp_path: Path):
    """SIGKILL while shards are being written, several times over: no finished shard is written again."""
    source = large_source(tmp_path / "source", 40, (900, 800))
    options = {"shard_samples": 2, "image": config(400), "split": DrawConfig(val=0.2)}
    run(source, tmp_path / "a/set", **options)
    place = tmp_path / "b/.set.building"
    kept: dict[str, int] = {}
    for num in (0, 1, 2, 5, 9):
        pid = fork(lambda: run(source, tmp_path / "b/set", **options))
        end = time.monotonic() + 30
        while len(list(place.glob("notes/*.json"))) < num and time.monotonic() < end:
            time.sleep(0.003)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not (tmp_path / "b/set").exists()
        names = {file.name.removesuffix(".json") for file in place.glob("notes/*.json")}
        inodes = {name: (place / "set" / name).stat().st_ino for name in names}
        assert kept.items() <= inodes.items()
        kept = inodes
    run(source, tmp_path / "b/set", **options)
    assert bytes_of(tmp_path / "a/set") == bytes_of(tmp_path / "b/set")
    assert 9 <= len(kept) < 20
    assert all((tmp_path / "b/set" / name).stat().st_ino == inode for name, inode in kept.items())
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["set"]


@pytest.mark.process
def test_the_number_of_processes_changes_no_byte(tmp_path: Path):
    source = large_source(tmp_path / "source", 24)
    for workers in (0, 2):
        options = {"shard_samples": 2, "image": config(200), "split": DrawConfig(val=0.3), "workers": workers}
        run(source, tmp_path / str(workers) / "set", **options)
    assert bytes_of(tmp_path / "0/set") == bytes_of(tmp_path / "2/set")


def test_what_was_seen_of_images_is_kept_and_looked_at_anew_where_a_file_changed(tmp_path: Path, monkeypatch):
    source = jsonl(tmp_path / "source", captioned())
    looked = []
    look = rows.look_at_images
    monkeypatch.setattr(rows, "look_at_images", lambda places, *rest: looked.append(len(places)) or look(places, *rest))
    monkeypatch.setattr(rows, "CHUNK", 4)

    def failing(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "write_shard", failing)
        run(source, tmp_path / "out")
    assert looked == [4, 4, 1]
    (source / "5.jpg").write_bytes(picture(77))
    shutil.copy2(source / "0.jpg", source / "copy.jpg")
    run(source, tmp_path / "out")
    assert looked == [4, 4, 1, 4]
