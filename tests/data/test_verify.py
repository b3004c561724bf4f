import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shards import jpeg, list_shards, pairs, write_shards, write_tar

from clipft.cli import main
from clipft.config import DataConfig, VerifyConfig
from clipft.data import look as look_module
from clipft.data import progress
from clipft.data.index import index_places, load_index
from clipft.data.split import load_splits
from clipft.data.verify import Report, describe, refuse, summed, verify


def packed(folder: Path) -> Path:
    """A set of 5 + 4 training and 3 test samples with shards.json and stored indexes."""
    train = [Path(path) for path in write_shards(folder, 5, 4, prefix="train-")]
    shards = {"train": train, "test": [Path(write_tar(folder / "test-000.tar", pairs(9, 3)))]}
    list_shards(folder, shards)
    return folder


def report_of(folder: Path, decode: bool = True, **options) -> Report:
    return verify(VerifyConfig(data=DataConfig(path=str(folder), workers=0, **options), decode=decode))


def verdict(report: Report) -> str:
    """What the command refuses the set with; nothing for a sound one."""
    try:
        refuse(report, max_bad_frac=0.05)
    except ValueError as error:
        return str(error)
    return ""


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def keep_time(path: Path, change: Callable[[], object]) -> None:
    """Changes the file as a disk does that loses a bit, or a copy that keeps the time."""
    stat = path.stat()
    change()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_sound_set_is_said_to_be_as_it_was_written(tmp_path: Path):
    report = report_of(packed(tmp_path / "birds"))
    assert verdict(report) == ""
    text = describe(report)
    assert "The sha256 of every shard was compared with shards.json." in text
    assert text.endswith("All of it is as it was written.")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:-1]}
    assert rows["split"] == ["shards", "indexed", "fine", "dropped", "captioned", "labelled"]
    assert rows["train"] == ["2", "9", "9", "0", "9", "0"]
    assert rows["test"] == ["1", "3", "3", "0", "3", "0"]
    assert rows["total"] == ["3", "12", "12", "0", "12", "0"]


@pytest.mark.parametrize("decode", [True, False])
def test_a_flipped_bit_that_still_decodes_is_found_and_its_shard_named(tmp_path: Path, decode: bool):
    """In a caption, with size and time kept: nothing but the checksum can see it."""
    shard = packed(tmp_path) / "train-001.tar"
    place = shard.read_bytes().index(b"picture 7") + 8
    keep_time(shard, lambda: flip(shard, place))
    report = report_of(tmp_path, decode=decode)
    assert summed(report.splits["train"])["fine"] == 9
    message = verdict(report)
    assert "1 of 3 shards" in message and f"{shard}: its sha256 is not the one in shards.json" in message
    assert "train-000" not in message and "Copy them again" in message and "clipft data pack" in message
    assert "as it was written" not in describe(report)


def test_every_shard_that_is_missing_cut_or_changed_is_named_at_once(tmp_path: Path):
    packed(tmp_path)
    first, second, test = (tmp_path / name for name in ("train-000.tar", "train-001.tar", "test-000.tar"))
    size = second.stat().st_size
    first.unlink()
    second.write_bytes(second.read_bytes()[:700])
    flip(test, 0)  # in the name of the first member
    report = report_of(tmp_path)
    lines = verdict(report).splitlines()
    assert lines[0] == "3 of 3 shards cannot be trusted:"
    assert lines[1] == f"{first}: cannot be read: No such file or directory"
    assert lines[2].startswith(f"{second}: its sha256 is not the one in shards.json: it has 700 bytes, {size} were")
    assert "the file ends at byte 700" in lines[2]
    assert lines[3].startswith(f"{test}: ") and "damaged header" in lines[3]
    sums = summed(report.splits["train"])
    assert sums["indexed"] == sums["dropped"] and sums["fine"] == 0


def test_without_shards_json_there_is_no_checksum_and_samples_are_counted_by_reason(tmp_path: Path):
    members = [*pairs(0, 40), ("bad.jpg", jpeg(50)[:-200]), ("bad.txt", b"a dog"), ("blank.jpg", jpeg(51))]
    members += [("blank.txt", b" "), ("alone.jpg", jpeg(52)), ("README", b"hello")]
    write_tar(tmp_path / "a.tar", members)
    report = report_of(tmp_path)
    looked = report.splits["train"][0]
    assert (looked.indexed, looked.fine) == (43, 40)
    assert looked.dropped == {"no_text": 1, "image_truncated": 1, "no_caption": 1}
    assert sum(looked.dropped.values()) + looked.fine == looked.indexed
    text = describe(report)
    assert "There is no shards.json, so no checksum to compare" in text and text.endswith("No damage found.")
    assert "train: 1 dropped, image_truncated, such as a/bad" in text
    assert "train: 1 member without a sample (no_extension)" in text
    assert "data.max_bad_frac=0.05" in verdict(report)
    assert "without any sample" not in text
    refuse(report, max_bad_frac=0.1)
    write_tar(tmp_path / "b.tar", [])
    assert f"train: 1 shard without any sample, such as {tmp_path}/b.tar" in describe(report_of(tmp_path))
    headers = report_of(tmp_path, decode=False)
    assert headers.splits["train"][0].dropped == {"no_text": 1}
    assert "were not looked at (decode=false)" in describe(headers) and "captioned" not in describe(headers)


def test_each_split_is_judged_by_itself_as_training_judges_it(tmp_path: Path):
    bad = [(f"b{i}.{kind}", raw) for i in range(5) for kind, raw in (("jpg", jpeg(50 + i)), ("txt", b" "))]
    write_tar(tmp_path / "train-0.tar", pairs(0, 200))
    write_tar(tmp_path / "val-0.tar", [*pairs(200, 5), *bad])
    write_tar(tmp_path / "test-0.tar", bad[:2])
    report = report_of(tmp_path)
    val, test, hint = verdict(report).splitlines()
    assert val == (
        "val: 5 of 10 samples cannot be used, more than data.max_bad_frac=0.05: training would stop. "
        "Repair the data, or raise the limit."
    )
    assert test.startswith("test: 1 of 1 samples cannot be used") and hint == "out=FILE names all of them."
    with pytest.raises(ValueError, match=r"^test: none of 1 sample can be used\."):
        refuse(report, max_bad_frac=1.0)
    write_tar(tmp_path / "val-0.tar", [*pairs(200, 5), *bad[::2]])  # without texts, which headers show
    (tmp_path / "test-0.tar").unlink()
    assert "val: 5 of 10" in verdict(report_of(tmp_path, decode=False))
    with pytest.raises(ValueError, match=r"^data\.val: 5 of 10 samples cannot be used"):
        load_splits(DataConfig(path=str(tmp_path)))


def test_limits_and_repairs_of_the_config_hold(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [*pairs(0, 3), ("x.jpg", jpeg(3)), ("x.txt", b"caf\xe9")])
    assert report_of(tmp_path).splits["train"][0].dropped == {"bad_utf8": 1}
    assert report_of(tmp_path, text_errors="replace").splits["train"][0].dropped == {}
    assert report_of(tmp_path, max_pixels=100).splits["train"][0].dropped == {"too_large": 3, "bad_utf8": 1}
    assert "4 of 4 samples" in verdict(report_of(tmp_path, max_pixels=100))


def test_labels_count_where_they_have_a_class(tmp_path: Path):
    members = [(f"{i}.jpg", jpeg(i)) for i in range(4)] + [(f"{i}.cls", b"%d" % i) for i in range(3)]
    write_tar(tmp_path / "test-0.tar", [*members, ("3.cls", b"cat")])
    assert report_of(tmp_path).splits["test"][0].dropped == {"no_caption": 4}
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    looked = report_of(tmp_path).splits["test"][0]
    assert (looked.fine, looked.captioned, looked.labelled) == (2, 0, 2)
    assert looked.dropped == {"label_without_class": 1, "bad_label": 1}


def test_splits_of_other_names_and_tars_that_are_not_listed_are_read_too(tmp_path: Path):
    packed(tmp_path)
    manifest = json.loads((tmp_path / "shards.json").read_text())
    manifest["splits"]["extra"] = manifest["splits"].pop("test")
    (tmp_path / "shards.json").write_text(json.dumps(manifest))
    (tmp_path / "stray.tar").write_bytes(b"<!DOCTYPE html>")
    flip(tmp_path / "test-000.tar", 700)
    report = report_of(tmp_path)
    assert {split: len(shards) for split, shards in report.splits.items()} == {"train": 2, "extra": 1, "unlisted": 1}
    message = verdict(report)
    assert f"{tmp_path}/test-000.tar: its sha256" in message and f"{tmp_path}/stray.tar: not a tar archive" in message
    assert "The sha256 of 3 shards was compared" in describe(report)


def test_named_shards_are_compared_with_the_list_beside_them(tmp_path: Path):
    packed(tmp_path / "birds")
    write_shards(tmp_path, 2)
    flip(tmp_path / "birds/train-001.tar", 700)
    shards = [str(tmp_path / "birds/train-00*.tar"), str(tmp_path / "000.tar")]
    report = verify(VerifyConfig(data=DataConfig(train=shards, workers=0)))
    assert [bool(each.problems) for each in report.splits["train"]] == [False, True, False]
    assert report.num_listed == 2


def test_a_stored_index_of_other_bytes_is_found(tmp_path: Path):
    """What a copy leaves that puts back the bytes and the time of a file which was indexed while it was damaged."""
    shard = packed(tmp_path) / "train-000.tar"
    whole, place = shard.read_bytes(), index_places(shard)[0]
    other = whole.replace(b"00003.jpg", b"00009.jpg").replace(b"00003.txt", b"00009.txt")
    write_tar(shard, [(name.replace("00003", "00009"), raw) for name, raw in pairs(0, 5)])
    assert shard.read_bytes() != whole and len(other) == len(whole)
    stamp = shard.stat().st_mtime_ns
    assert "00009" in load_index(shard).keys
    shard.write_bytes(whole)
    os.utime(shard, ns=(stamp, stamp))
    assert "00009" in load_index(shard).keys, "training would go by it"
    assert f"its stored index is one of other bytes: delete {place}" in verdict(report_of(tmp_path))
    place.unlink()
    assert verdict(report_of(tmp_path)) == "" and not place.exists(), "verify reads, and writes nothing"


def test_the_command_ends_with_2_and_names_what_is_wrong(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed(tmp_path / "data/birds")
    arguments = ["data", "verify", "data=birds", "data.workers=0"]
    assert main(arguments) == 0
    assert "All of it is as it was written." in capsys.readouterr().out
    flip(tmp_path / "data/birds/train-001.tar", 700)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "total" in out and err.startswith("error: 1 of 3 shards") and "train-001.tar: its sha256" in err
    assert main([*arguments, "decode=false"]) == 2
    assert "decode=false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "There is no data. Give data=NAME"),
        (["data=bords"], "Did you mean data=birds?"),
        (["data.path=nowhere"], "nowhere"),
        (["data=birds", "decode=perhaps"], "decode"),
        (["data=birds", "model=tiny"], "model is no option"),
        (["data=birds", "data.val=data/none"], "data.val='data/none' matches no shard"),
        (["data=empty"], "holds no shards"),
        (["data=torn"], "is not a list of shards"),
        (["data=bare"], "holds no shards"),
    ],
)
def test_wrong_input_says_what_to_do(tmp_path: Path, capsys, monkeypatch, arguments: list[str], says: str):
    monkeypatch.chdir(tmp_path)
    packed(tmp_path / "data/birds")
    (tmp_path / "data/empty").mkdir()
    (tmp_path / "data/torn").mkdir()
    (tmp_path / "data/torn/shards.json").write_text("{")
    (tmp_path / "data/bare").mkdir()
    (tmp_path / "data/bare/shards.json").write_text('{"version": 1, "splits": {}}')
    assert main(["data", "verify", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_progress_is_told_when_it_takes_long(tmp_path: Path, capsys, monkeypatch):
    packed(tmp_path)
    report_of(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    report_of(tmp_path)
    assert capsys.readouterr().err.startswith("reading: 1 of 3 shards after 0:00, about 0:00 left\n")


@pytest.mark.process
def test_several_processes_find_what_one_finds_without_torch(tmp_path: Path):
    packed(tmp_path)
    flip(tmp_path / "train-001.tar", 700)
    code = (
        "import sys\n"
        "from clipft.cli import main\n"
        "if __name__ == '__main__':\n"
        f"    code = main(['data', 'verify', 'data={tmp_path}', 'data.workers=' + sys.argv[1]])\n"
        "    print(code, 'torch' in sys.modules)\n"
    )
    (tmp_path / "command.py").write_text(code)
    one, two = (
        subprocess.run([sys.executable, tmp_path / "command.py", workers], capture_output=True, text=True, check=True)
        for workers in ("0", "2")
    )
    assert one.stdout == two.stdout and one.stderr == two.stderr
    assert two.stdout.endswith("2 False\n") and "train-001.tar" in two.stderr


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc")
def test_a_process_that_dies_ends_the_command_and_leaves_none_behind(tmp_path: Path):
    """One shard is a pipe that nobody writes to: its reader waits until it is killed."""
    shard = write_shards(tmp_path, 3)[0]
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import os, signal, sys, threading, time, multiprocessing\n"
        "from clipft.data import verify\n"
        "from clipft.report import RunFailed\n"
        "if __name__ == '__main__':\n"
        "    def kill():\n"
        "        time.sleep(3)\n"
        "        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "    if sys.argv[1] == 'worker':\n"
        "        threading.Thread(target=kill).start()\n"
        "    try:\n"
        f"        paths = [{shard!r}, {str(tmp_path / 'pipe')!r}]\n"
        "        verify.look_at_all(paths, verify.Rules(True, 100, 'strict', 0), 2)\n"
        "    except RunFailed as error:\n"
        "        print(error)\n"
    )
    (tmp_path / "command.py").write_text(code)
    command = [sys.executable, str(tmp_path / "command.py")]
    done = subprocess.run([*command, "worker"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "data.workers=1" in done.stdout
    parent = subprocess.Popen([*command, "parent"])
    time.sleep(3)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_samples_of_a_damaged_shard_are_counted_as_dropped(tmp_path: Path):
    shard = Path(write_shards(tmp_path, 5)[0])
    flip(shard, shard.read_bytes().index(b"00003.jpg"))
    looked = report_of(tmp_path).splits["train"][0]
    assert (looked.indexed, looked.fine, looked.dropped) == (3, 0, {"in_damaged_shard": 3})
    assert looked.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_every_finding_can_be_written_to_a_file(tmp_path: Path):
    packed(tmp_path / "birds")
    members = [*pairs(20, 9), *((f"b{i}.{kind}", b"x") for i in range(30) for kind in ("jpg", "txt")), ("c.txt", b"")]
    whole, cut = write_tar(tmp_path / "a.tar", members), write_tar(tmp_path / "b.tar", pairs(60, 4))
    Path(cut).write_bytes(Path(cut).read_bytes()[: 3 * 2560 + 100])
    out = tmp_path / "found.jsonl"
    data = DataConfig(train=[whole, cut], workers=0)
    report = verify(VerifyConfig(data=data, out=str(out)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["key"], row["reason"]) for row in rows if row["shard"] == whole} == {
        *((f"a/b{i}", "format_not_allowed") for i in range(30)),
        ("a/c", "no_image"),
    }
    raw = Path(whole).read_bytes()
    for row in rows:
        if row["shard"] == whole:
            assert raw[row["byte"] :].startswith(row["key"].removeprefix("a/").encode() + b".")
    [damage, *others] = [row for row in rows if row["shard"] == cut]
    assert damage["key"] is None and damage["byte"] is None and "cut inside a header" in damage["reason"]
    assert [(row["key"], row["reason"]) for row in others] == [(f"b/{i:05d}", "in_damaged_shard") for i in (60, 61, 62)]
    assert f"with reason, shard and byte, stands in {out}" in describe(report)
    plain = verify(VerifyConfig(data=DataConfig(train=whole, workers=0)))
    assert "can be written to a file: out=FILE" in describe(plain) and "out=FILE names all" in verdict(plain)
    assert "out=FILE" not in describe(verify(VerifyConfig(data=DataConfig(path=str(tmp_path / "birds"), workers=0))))


@pytest.mark.parametrize("out", [".", "nowhere/found.jsonl"])
def test_a_file_for_findings_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path, out: str):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"out=.* must be a file in a folder that is there"):
        verify(VerifyConfig(data=DataConfig(path=str(tmp_path)), out=str(tmp_path / out)))


def test_a_shard_that_may_be_cut_is_said_unless_its_checksum_is_known(tmp_path: Path):
    shard = packed(tmp_path) / "train-001.tar"
    shard.write_bytes(shard.read_bytes()[:17408])
    (tmp_path / "shards.json").rename(tmp_path / "old.json")
    assert "train: 1 of 2 shards may be cut: nothing but" in describe(report_of(tmp_path))
    list_shards(tmp_path, {"train": [tmp_path / "train-000.tar", shard]})
    assert "may be cut" not in describe(report_of(tmp_path)) and verdict(report_of(tmp_path)) == ""


def test_an_error_that_is_no_fault_of_a_sample_is_raised_with_its_key(tmp_path: Path, monkeypatch):
    def broken(raw: bytes, max_pixels: int) -> None:
        raise ValueError("no such thing")

    packed(tmp_path)
    monkeypatch.setattr(look_module, "decode_rgb", broken)
    with pytest.raises(RuntimeError, match="reading train-000/00000 failed: ValueError: no such thing"):
        report_of(tmp_path)


def test_a_pipe_among_the_shards_is_refused(tmp_path: Path):
    os.mkfifo(packed(tmp_path) / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar is no plain file, and no shard"):
        report_of(tmp_path)
