import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shards import Members, jpeg, pairs, write_shards, write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import ShardWriter

from clipft.data.caption import captions_of
from clipft.data.index import Samples, index_places, index_shards, load_index, read_index, seal, write_index
from clipft.data.sample import BadSample, image_of, printable
from clipft.data.shard import scan_shard, split_name


def by_webdataset(shards: list[str]) -> Iterator[dict]:
    """The samples as webdataset groups them; its own opener leaves the files open."""
    for shard in shards:
        with open(shard, "rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))


def same_as_webdataset(samples: Samples) -> None:
    theirs = list(by_webdataset(samples.shards))
    assert len(theirs) == len(samples)
    for i, sample in enumerate(theirs):
        stem = os.path.basename(sample["__url__"]).removesuffix(".tar")
        assert samples.key(i) == printable(f"{stem}/{sample['__key__']}")
        expected = [(kind, raw) for kind, raw in sample.items() if not kind.startswith("__")]
        assert list(samples.read(i, tuple(samples.kinds)).items()) == expected


def test_shards_of_webdatasets_writer_give_the_samples_that_webdataset_reads(tmp_path: Path):
    with ShardWriter(str(tmp_path / "x-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"a/{i:03d}", "jpg": jpeg(i), "txt": f"no {i}", "json": {"n": i}, "cls": i})
    same_as_webdataset(index_shards([str(path) for path in sorted(tmp_path.glob("*.tar"))]))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_read_as_webdataset_reads_them(tmp_path: Path, format: int):
    stems = ["x" * 90, "folder/" * 12 + "y" * 90, "./dot", "../up", "/absolute", "UPPER"]
    if format != tarfile.USTAR_FORMAT:
        stems += ["z" * 300, "größe 图", "line\nbreak"]
    members = [(f"{stem}.{kind}", f"{n} {kind}".encode()) for n, stem in enumerate(stems) for kind in ("JPG", "txt")]
    same_as_webdataset(index_shards([write_tar(tmp_path / "a.tar", members, format)]))


PICTURES = ("jpg", "png", "webp")


def as_img2dataset(i: int) -> tuple[bytes, dict]:
    """The bytes of an image, and a row of metadata as img2dataset writes it."""
    raw = jpeg(i)
    return raw, {
        "caption": f"no {i}, “quoted” & größer",
        "url": f"https://example.org/{i}.jpg?w=1&h=2",
        "key": f"{i:09d}",
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 20,
        "original_width": 24,
        "original_height": 20,
        "exif": "{}",
        "sha256": hashlib.sha256(raw).hexdigest(),
        "md5": hashlib.md5(raw).hexdigest(),
        "similarity": 0.3 + i,
        "LICENSE": "?",
        "NSFW": None,
    }


@pytest.mark.parametrize("kind", PICTURES)
def test_shards_of_img2dataset_give_the_samples_that_webdataset_reads(tmp_path: Path, kind: str):
    members: Members = []
    for i in range(6):
        raw, row = as_img2dataset(i)
        text = json.dumps(row, indent=4).encode()
        members += [(f"{i:09d}.json", text), (f"{i:09d}.txt", row["caption"].encode()), (f"{i:09d}.{kind}", raw)]
    samples = index_shards([write_tar(tmp_path / "00000.tar", members)])
    same_as_webdataset(samples)
    for i in range(6):
        raw, row = as_img2dataset(i)
        assert samples.key(i) == f"00000/{i:09d}"
        assert image_of(samples.read(i)) == raw and captions_of(samples.read(i)) == [row["caption"]]


def test_a_row_of_img2dataset_without_a_caption_is_counted_as_such(tmp_path: Path):
    raw, row = as_img2dataset(0)
    members = [("0.jpg", raw), ("0.txt", b""), ("0.json", json.dumps(row | {"caption": None}).encode())]
    with pytest.raises(BadSample, match="no_caption"):
        captions_of(index_shards([write_tar(tmp_path / "0.tar", members)]).read(0))


def test_shards_as_open_clip_describes_them_give_the_samples_that_webdataset_reads(tmp_path: Path):
    shards = []
    for n, columns in enumerate((None, "text", "caption", "captions")):
        members: Members = []
        for i in range(3):
            text = f"no {i}"
            words = (f"{i:05d}.json", json.dumps({columns: text, "id": i}).encode())
            members += [(f"{i:05d}.jpg", jpeg(i)), words if columns else (f"{i:05d}.txt", text.encode())]
        shards.append(write_tar(tmp_path / f"{n:05d}.tar", members))
    samples = index_shards(shards)
    same_as_webdataset(samples)
    assert [captions_of(samples.read(i)) for i in range(12)] == [[f"no {i % 3}"] for i in range(12)]


def test_a_key_is_printable_on_one_line_whatever_a_name_holds(tmp_path: Path):
    names = ["red\x1b[31m", "two\nlines", "bell\x07", "csi\x9b1m", "right\u202eleft", "größe 图 😀"]
    members = [(f"{name}.{kind}", b"") for name in names for kind in ("jpg", "txt")]
    samples = index_shards([write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)])
    keys = [samples.key(i) for i in range(6)]
    shown = ["red\\x1b[31m", "two\\nlines", "bell\\x07", "csi\\x9b1m", "right\\u202eleft", "größe 图 😀"]
    assert keys == [f"a/{name}" for name in shown] and all(key.isprintable() for key in keys)


def test_names_that_are_no_utf8_have_a_printable_key(tmp_path: Path):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("é.jpg", "é.txt"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "a.tar").write_bytes(raw.getvalue())
    for _ in range(2):  # scanned, then from the stored index
        assert index_shards([str(tmp_path / "a.tar")]).key(0) == "a/\\xe9"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a/b.c/d.JPG", ("a/b.c/d", "jpg")),
        ("a.seg.npy", ("a", "seg.npy")),
        ("IMG_1.5x.jpg", ("IMG_1.5x", "jpg")),
        ("IMG_1.5x.TXT", ("IMG_1.5x", "txt")),
        ("README", None),
        (".hidden.jpg", None),
        ("a.", None),
    ],
)
def test_a_name_is_cut_at_the_first_dot_or_before_a_known_extension(name: str, expected: tuple | None):
    assert split_name(name) == expected


def test_members_of_a_sample_need_not_lie_together(tmp_path: Path):
    mixed = pairs(0, 5)
    apart = sorted(mixed, key=lambda member: member[0].endswith("txt"))
    one, two = (index_shards([write_tar(tmp_path / name / "a.tar", m)]) for name, m in (("1", mixed), ("2", apart)))
    assert [one.read(i) for i in range(5)] == [two.read(i) for i in range(5)]


def test_what_is_no_sample_is_left_out_and_counted_by_reason(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        names = ["good.jpg", "good.txt", "good.mask.png", "alone.jpg", "words.txt", "twice.jpg", "twice.txt"]
        for name in [*names, "twice.jpg", "twice.txt", "twice.txt", "README", "._good.jpg", "__meta__/x.jpg"]:
            tar.addfile(tarfile.TarInfo(name))
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("disk.jpg", tarfile.BLKTYPE),
            ("console.jpg", tarfile.CHRTYPE),
            ("dir", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    index = scan_shard(tmp_path / "a.tar")
    assert index.keys == ["good"] and index.kinds == ["jpg", "txt"]
    headers = {name: 512 * n for n, name in enumerate(names)}
    assert index.dropped == {
        "no_text": {"alone": headers["alone.jpg"]},
        "no_image": {"words": headers["words.txt"]},
        "duplicate_key": {"twice": headers["twice.jpg"], "twice (2)": 512 * 7, "twice (3)": 512 * 9},
    }
    assert index.ignored == {"extra": 1, "no_extension": 2, "meta": 1, "not_a_plain_file": 5, "folder": 1}
    assert index.problems == []
    samples = index_shards([str(tmp_path / "a.tar")])
    assert samples.dropped == {"no_text": 1, "no_image": 1, "duplicate_key": 3}
    assert samples.ignored == index.ignored
    assert samples.examples["duplicate_key"] == f"twice (byte {headers['twice.jpg']} of {tmp_path}/a.tar)"


@pytest.mark.parametrize("record", [512, 10240, 1 << 16, 1 << 20])
def test_zeros_behind_a_tar_are_padding_up_to_a_whole_record_and_damage_beyond_it(tmp_path: Path, record: int):
    raw = Path(write_tar(tmp_path / "whole.tar", pairs(0, 40))).read_bytes().rstrip(b"\0")
    content = len(raw) + -len(raw) % 512 + 1024
    for extra, sound in ((-content % record, True), (-content % record + 3 * 512 + (1 << 20), False)):
        (tmp_path / "a.tar").write_bytes(raw.ljust(content + extra, b"\0"))
        assert (scan_shard(tmp_path / "a.tar").problems == []) is sound


def test_a_tail_of_zeros_is_damage_also_where_it_is_short(tmp_path: Path):
    whole = Path(write_tar(tmp_path / "whole.tar", pairs(0, 200)))
    raw = whole.read_bytes()
    (tmp_path / "a.tar").write_bytes(raw[: 20 * 2560] + bytes(len(raw) - 20 * 2560))
    [(byte, what)] = scan_shard(tmp_path / "a.tar").problems
    assert byte == 20 * 2560 and "zero bytes from here on" in what


@pytest.mark.skipif(not shutil.which("tar"), reason="tar")
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 10, 12, 15, 20, 24, 30, 64, 100, 200, 512, 2048])
def test_a_tar_with_records_of_any_size_is_whole_and_said_to_be_odd_where_it_is(tmp_path: Path, blocks: int):
    (tmp_path / "in").mkdir()
    for count in (151, 170, 193):
        for name, raw in pairs(0, count):
            (tmp_path / "in" / name).write_bytes(raw)
        shard = tmp_path / f"{count}.tar"
        subprocess.run(["tar", f"-b{blocks}", "-cf", shard, "-C", tmp_path / "in", "."], check=True)
        index = scan_shard(shard)
        assert index.problems == [] and len(index.keys) == count
        num_zeros = index.size - len(shard.read_bytes().rstrip(b"\0"))
        if index.doubts:
            [(byte, what)] = index.doubts
            assert f"nothing but {index.size - byte} zero bytes" in what and blocks not in (1, 20)
            assert index_shards([str(shard)]).doubts == {str(shard): f"{what} (byte {byte} of {shard})"}
        else:
            assert num_zeros < 10240 + 3 * 512, "that many need no mention"


@pytest.mark.parametrize("size", [20480, 65536, 1 << 20])
def test_a_file_of_nothing_but_zeros_is_no_tar_unless_it_is_an_empty_one(tmp_path: Path, size: int):
    empty = Path(write_tar(tmp_path / "empty.tar", []))
    assert empty.read_bytes() == bytes(10240) and scan_shard(empty).problems == scan_shard(empty).doubts == []
    (tmp_path / "a.tar").write_bytes(bytes(size))
    [(byte, what)] = scan_shard(tmp_path / "a.tar").problems
    assert byte == 0 and f"{size} zero bytes" in what


@pytest.mark.parametrize("kind", ["txt", "json", "jpg", "png"])
def test_zeros_that_begin_inside_the_last_member_are_noticed_however_few_they_are(tmp_path: Path, kind: str):
    """As tar writes it the shard ends in less than 10 kB of zeros also after it has lost its last sample."""
    last = {"txt": b"words " * 200, "json": b'{"caption": "%s"}' % (b"a dog " * 200)}.get(kind, jpeg(7) * 2)
    first = [("0.cls", b"1"), ("0.png" if kind != "png" else "0.jpg", jpeg(0)), (f"1.{kind}", last)]
    whole = Path(write_tar(tmp_path / "whole.tar", [*first, ("2.jpg", jpeg(2)), ("2.txt", b"a bird")]))
    raw, start = whole.read_bytes(), 512 + 512 + 512 + -(-len(jpeg(0)) // 512) * 512 + 512
    assert raw[start : start + len(last)] == last and scan_shard(whole).doubts == []
    (tmp_path / "a.tar").write_bytes(raw[: start + 512].ljust(len(raw), b"\0"))
    index = scan_shard(tmp_path / "a.tar")
    [(byte, what)] = index.problems or index.doubts
    assert bool(index.problems) is (kind in ("txt", "json"))  # a picture is judged when it is decoded
    assert raw[byte : byte + 5] == b"2.jpg" and f"zeros at the end of '1.{kind}'" in what


def test_zeros_behind_the_end_of_a_picture_and_black_pixels_are_no_sign_of_damage(tmp_path: Path):
    for name, raw in (("0.jpg", jpeg(0) + bytes(3000)), ("0.bmp", b"BM" + bytes(3000)), ("0.txt", b"a dog")):
        index = scan_shard(write_tar(tmp_path / "a.tar", [("0.cls", b"1"), (name, raw)]))
        assert index.problems == index.doubts == []


def test_a_shard_cut_anywhere_is_a_problem_and_never_a_wrong_sample(tmp_path: Path):
    whole = Path(write_tar(tmp_path / "whole.tar", pairs(0, 3)))
    raw, index = whole.read_bytes(), scan_shard(whole)
    end = max(offset + size for offset, size in zip(index.offsets, index.sizes, strict=True))
    end += -end % 512  # from here on there are only zeros
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 512, 97), *range(0, end + 512, 512)]:
        cut.write_bytes(raw[:length])
        part = scan_shard(cut)
        assert part.problems, length
        assert part.problems[0][0] <= length
        assert all(key in index.keys for key in part.keys)
    cut.write_bytes(raw[: end + 512])
    assert scan_shard(cut).problems == []


def broken(kind: str, raw: bytes) -> tuple[bytes, int, str]:
    """Bytes of a damaged shard, the byte that must be named, and a word of the reason."""
    header = raw.index(b"00001.jpg")
    end = len(raw.rstrip(b"\0")) + -len(raw.rstrip(b"\0")) % 512
    match kind:
        case "html":
            return b"<!DOCTYPE html><html>" + b" " * 2000, 0, "not a tar archive"
        case "gzip":
            return gzip.compress(raw), 0, "not a tar archive"
        case "empty file":
            return b"", 0, "empty"
        case "damaged header":
            return raw[: header + 100] + b"\xff" * 50 + raw[header + 150 :], header, "damaged header"
        case "damaged first header":
            return b"X" + raw[1:], 0, "damaged header"
        case "stray zero block":
            return raw[:header] + b"\0" * 512 + raw[header:], header + 512, "more data"
        case "appended archive":
            return raw + raw, len(raw), "more data"
        case "no end":
            return raw[:end], end, "no end-of-archive"
        case "unfinished copy":
            return (
                raw[: header + 700] + bytes(2 << 20),
                -(-(header + 512 + len(jpeg(1))) // 512) * 512,
                "unfinished copy",
            )
        case "cut in the first member":
            return raw[:700], 512, "'00000.jpg' should run to byte"
        case _:
            return raw[: header + 700], header + 512, "should run to byte"


KINDS = [
    "html",
    "gzip",
    "empty file",
    "damaged header",
    "damaged first header",
    "stray zero block",
    "appended archive",
    "no end",
    "unfinished copy",
    "cut in the first member",
    "cut",
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_with_shard_and_byte(tmp_path: Path, kind: str):
    good, other = write_shards(tmp_path, 3, 3)
    raw, byte, reason = broken(kind, Path(write_tar(tmp_path / "bad.tar", pairs(0, 3))).read_bytes())
    (tmp_path / "bad.tar").write_bytes(raw)
    for _ in range(2):  # scanned, then from the stored index
        with pytest.raises(ValueError, match="copy or write it again") as error:
            index_shards([good, str(tmp_path / "bad.tar"), other])
        assert f"{tmp_path}/bad.tar" in str(error.value)
        assert f"(byte {byte} of {len(raw)})" in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize(("members", "reason"), [([], "no members"), ([("a.jpg", b"")], "1 no_text")])
def test_shards_without_any_sample_raise(tmp_path: Path, members: Members, reason: str):
    with pytest.raises(ValueError, match=rf"no usable sample \({reason}"):
        index_shards([write_tar(tmp_path / "a.tar", members)])


def test_the_stored_index_is_used_until_size_or_mtime_changes(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", pairs(0, 3))
    write_index(shard)
    place = index_places(shard)[0]
    stored = json.loads(place.read_text())
    del stored["sha256"]
    changed = stored | {"keys": ["x", "y", "z"]}
    place.write_text(json.dumps(changed | {"sha256": seal(changed)}))
    assert load_index(shard).keys == ["x", "y", "z"]
    os.utime(shard, ns=(0, stored["mtime_ns"] + 1))
    assert load_index(shard) == scan_shard(shard)
    write_tar(tmp_path / "a.tar", pairs(0, 4))
    os.utime(shard, ns=(0, stored["mtime_ns"] + 1))
    assert len(load_index(shard).keys) == 4


SEALED = [json.dumps(row | {"sha256": seal(row)}).encode() for row in ({}, {"problems": 1}, {"problems": []})]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"sha256": 1}', b"\xff", b"[" * 10**5, *SEALED]
)
def test_an_index_file_that_cannot_be_used_is_written_again(tmp_path: Path, raw: bytes):
    shard = write_tar(tmp_path / "a.tar", pairs(0, 3))
    index_places(shard)[0].write_bytes(raw)
    assert load_index(shard) == scan_shard(shard) == read_index(index_places(shard)[0])


def test_an_index_file_with_one_changed_byte_is_written_again(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", pairs(0, 3))
    expected, place = write_index(shard), index_places(shard)[0]
    raw = place.read_bytes()
    for byte in range(0, len(raw), 7):
        place.write_bytes(raw[:byte] + bytes([raw[byte] ^ 1]) + raw[byte + 1 :])
        assert read_index(place) is None
    assert load_index(shard) == expected and place.read_bytes() == raw


def test_where_the_shards_folder_cannot_be_written_the_index_lies_in_the_user_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = write_tar(tmp_path / "data/a.tar", pairs(0, 3))
    beside, cached = index_places(shard)
    beside.mkdir()  # a folder in its place refuses the file even to root
    index = load_index(shard)
    assert read_index(cached) == index == load_index(shard)
    assert sorted(path.name for path in Path(shard).parent.iterdir()) == ["a.tar", "a.tar.index.json"]


def test_writers_at_the_same_time_never_leave_half_an_index(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", pairs(0, 20))
    expected = write_index(shard)
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(write_index, shard) for _ in range(40)]
        read = [pool.submit(read_index, index_places(shard)[0]) for _ in range(200)]
        assert all(future.result() == expected for future in written + read)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shard_changed_after_indexing_is_not_read(tmp_path: Path):
    shard = write_tar(tmp_path / "a.tar", pairs(0, 3))
    samples = index_shards([shard])
    write_tar(tmp_path / "a.tar", pairs(5, 3))
    os.utime(shard, ns=(0, 1))
    with pytest.raises(BadSample, match="shard_changed"):
        samples.read(0)
    assert index_shards([shard]).read(0)["txt"].startswith(b"picture 5\n")


def test_a_shard_written_again_in_place_is_not_read_any_further(tmp_path: Path):
    """The same file, of the same size, with other captions under the same keys."""
    shard = Path(write_tar(tmp_path / "a.tar", pairs(0, 3)))
    samples, raw = index_shards([str(shard)]), shard.read_bytes()
    assert samples.read(0)["txt"].startswith(b"picture 0")
    time.sleep(0.02)  # a tick of the clock of files
    with open(shard, "r+b") as file:
        file.write(raw.replace(b"picture 0", b"picture 1"))
    assert shard.stat().st_size == len(raw)
    for i in range(3):
        with pytest.raises(BadSample, match="shard_changed"):
            samples.read(i)


def test_a_shard_that_shrinks_while_it_is_read_makes_bad_samples(tmp_path: Path):
    samples = index_shards([write_tar(tmp_path / "a.tar", pairs(0, 3))])
    samples.read(0)
    os.truncate(tmp_path / "a.tar", 700)
    with pytest.raises(BadSample, match="short_read"):
        samples.read(2)


def test_the_fingerprint_is_that_of_names_sizes_and_contents_and_not_of_place_or_time(tmp_path: Path):
    shards = write_shards(tmp_path / "one", 3, 4)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copies = [str(tmp_path / "two" / os.path.basename(shard)) for shard in shards]
    for copy in copies:
        os.utime(copy, ns=(0, 5))
    fingerprint = index_shards(shards).fingerprint
    assert index_shards(copies).fingerprint == fingerprint
    others = [index_shards(copies[::-1]).fingerprint, index_shards(copies[:1]).fingerprint]
    os.rename(copies[0], tmp_path / "two/zzz.tar")
    others.append(index_shards([str(tmp_path / "two/zzz.tar"), copies[1]]).fingerprint)
    write_tar(tmp_path / "two/000.tar", [(name.replace("00001", "00009"), raw) for name, raw in pairs(0, 3)])
    others.append(index_shards(copies).fingerprint)
    assert len({fingerprint, *others}) == 5


def test_taken_samples_are_those_samples_with_a_fingerprint_of_their_own(tmp_path: Path):
    samples = index_shards(write_shards(tmp_path, 3, 4))
    taken = samples.take(np.array([6, 0, 3]))
    assert [taken.key(i) for i in range(3)] == ["001/00006", "000/00000", "001/00003"]
    assert [taken.read(i) for i in range(3)] == [samples.read(i) for i in (6, 0, 3)]
    others = [samples.take(np.array(indices)).fingerprint for indices in ([6, 0, 3], [0, 3, 6], [0])]
    assert others[0] == taken.fingerprint and len({samples.fingerprint, *others}) == 4


def test_only_the_wanted_members_are_read_and_the_image_is_found_among_them(tmp_path: Path):
    samples = index_shards([write_tar(tmp_path / "a.tar", [("a.png", b"P"), ("a.jpg", b"J"), ("a.cls", b"1")])])
    assert samples.read(0, ("cls", "txt")) == {"cls": b"1"}
    assert image_of(samples.read(0)) == b"J"
    with pytest.raises(BadSample, match="no_image"):
        image_of(samples.read(0, ("cls",)))
