"""Whatever happens to a shard, an image is never given another sample's caption, and no loss goes uncounted."""

import io
import random
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import jpeg

from clipft.data.augment import Augment
from clipft.data.caption import captions_of
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples, index_shards
from clipft.data.loader import train_loader
from clipft.data.order import Shuffle
from clipft.data.pairs import build_units
from clipft.data.sample import BadSample

NUM = 6
LONG = "folder of a name that no ustar header holds/" * 6


def text(i: int) -> bytes:
    return random.Random(i).randbytes(500).hex().encode()


@cache
def whole(format: int, order: str, seed: int) -> bytes:
    """A sound shard of NUM samples."""
    members = [(i, kind) for i in range(NUM) for kind in ("jpg", "txt")]
    if order == "images first":
        members.sort(key=lambda member: member[1])
    elif order == "shuffled":
        random.Random(seed).shuffle(members)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for i, kind in members:
            content = jpeg(i) if kind == "jpg" else text(i)
            name = f"{i:05d}.{kind}" if format == tarfile.USTAR_FORMAT else f"{LONG}ü{i:05d}.{kind}"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def stretches(content: bytes) -> set[bytes]:
    """All that is 8 bytes long in it."""
    return {content[place : place + 8] for place in range(len(content) - 7)}


@cache
def marks() -> dict[int, set[bytes]]:
    """Stretches that only one sample has, by its number."""
    all_of = {i: stretches(jpeg(i)) | stretches(text(i)) for i in range(NUM)}
    return {i: all_of[i].difference(*(all_of[j] for j in range(NUM) if j != i)) for i in range(NUM)}


def owner(content: bytes) -> set[int]:
    """The sample that most of a member's bytes came from; none where nothing of any is left."""
    found = {i: len(stretches(content) & own) for i, own in marks().items()}
    return {max(found, key=lambda i: found[i])} if any(found.values()) else set()


def disturb(raw: bytes, draw: random.Random) -> bytes:
    """The shard with up to two flipped bits, and with one fault of the kinds that disks, copies and crashes make.

    Only one: a zeroed header and a cut behind it together are the sound end of a shorter shard.
    """
    changed = bytearray(raw)
    for _ in range(draw.randint(0, 2)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    place = draw.randrange(len(changed))
    block = place // 512 * 512
    match draw.choice(["none", "none", "cut", "cut at a block", "zeros", "insert", "drop", "append"]):
        case "cut":
            del changed[place:]
        case "cut at a block":
            del changed[block:]
        case "zeros":
            changed[block : block + 512] = bytes(512)
        case "insert":
            changed[block:block] = bytes(512)
        case "drop":
            del changed[block : block + 512]
        case "append":
            changed += raw
    return bytes(changed)


CASES = [
    (format, order, seed)
    for seed in range(20)
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for order in ("together", "images first", "shuffled")
]


def index_or_none(path: Path, raw: bytes) -> Samples | None:
    """The samples, or None where the shard is refused, which has to name it and the byte."""
    path.write_bytes(raw)
    try:
        return index_shards([str(path)])
    except ValueError as error:
        assert str(path) in str(error) and ("(byte " in str(error) or "no usable sample" in str(error))
        return None


def test_a_disturbed_shard_is_refused_or_gives_right_pairs_and_counts_the_rest(tmp_path: Path):
    outcomes, num_pairs = Counter(), 0
    for number, (format, order, seed) in enumerate(CASES):
        raw = disturb(whole(format, order, seed), random.Random(number))
        # A name of its own for each: two writes within one tick of the clock would look unchanged.
        samples = index_or_none(tmp_path / f"{number}.tar", raw)
        outcomes["refused" if samples is None else "used"] += 1
        if samples is None:
            continue
        for i in range(len(samples)):
            members = samples.read(i)
            assert len(owner(members["jpg"]) | owner(members["txt"])) <= 1
            num_pairs += len(owner(members["jpg"]) & owner(members["txt"]))
        assert len(samples) + sum(samples.dropped.values()) >= NUM
    assert min(outcomes.values()) > 15 and num_pairs > 5 * outcomes["used"], outcomes


@pytest.mark.parametrize("order", ["together", "images first", "shuffled"])
def test_members_in_any_order_give_every_pair(tmp_path: Path, order: str):
    sound = whole(tarfile.PAX_FORMAT, order, 7)
    (tmp_path / "a.tar").write_bytes(sound)
    samples = index_shards([str(tmp_path / "a.tar")])
    numbers = [int(samples.key(i)[-5:]) for i in range(NUM)]
    assert sorted(numbers) == list(range(NUM))
    for i, number in enumerate(numbers):
        assert samples.read(i) == {"jpg": jpeg(number), "txt": text(number)}


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode()[:20].ljust(20, b"\0")) for text in texts])


def test_nothing_but_counted_drops_comes_out_of_the_loader(tmp_path: Path):
    plain = Augment(16, 1.0, 0.0, 0.0, "bicubic", "shortest", (0, 0, 0))
    dropped = Counter()
    for number, (format, order, seed) in enumerate(CASES[:36]):
        draw = random.Random(1000 + number)
        raw = bytearray(whole(format, order, seed))
        for i in range(NUM):
            for content in (jpeg(i), text(i)):
                raw[raw.index(content) + draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        samples = index_or_none(tmp_path / f"{number}.tar", bytes(raw))
        if samples is None:
            continue
        loader = train_loader(
            build_units(samples, "one"),
            augment=plain,
            tokenize=tokenize,
            max_pixels=1_000_000,
            positives="caption",
            group=None,
            text_errors="strict",
            seed=0,
            order=Shuffle(0, len(samples), len(samples)),
            num_steps=1,
            rank=0,
            world=1,
            start_step=0,
            workers=0,
            pin=False,
        )
        [batch] = list(loader)
        assert int(batch.valid.sum()) + len(batch.bad) == len(samples)
        dropped.update(batch.bad.values())
    assert dropped["bad_utf8"] and any(reason.startswith("image_") for reason in dropped), dropped


def with_header(kind: bytes, size: bytes) -> bytes:
    """A header of this type and size, with the right checksum."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[124:136] = kind, size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


HUGE = b"\x80" + b"\xff" * 11
SIZES = {
    "a member of exabytes": with_header(b"0", HUGE),
    "a name of exabytes": with_header(b"L", HUGE),
    "an extension of exabytes": with_header(b"x", HUGE),
    "a name of terabytes": with_header(b"L", b"\x80" + (1 << 42).to_bytes(11, "big")),
    "a member of less than nothing": with_header(b"0", b"\xff" * 10 + b"\xfe\0"),
    "thousands of names for one member": (with_header(b"L", b"00000000002\0") + b"x".ljust(512, b"\0")) * 3000,
}


@pytest.mark.parametrize("fault", SIZES)
def test_headers_that_make_no_sense_are_named_with_their_byte(tmp_path: Path, fault: str):
    sound = whole(tarfile.USTAR_FORMAT, "together", 0)
    end = len(sound.rstrip(b"\0"))
    end += -end % 512
    (tmp_path / "a.tar").write_bytes(sound[:end] + SIZES[fault] + sound[end:])
    with pytest.raises(ValueError, match=rf"a\.tar: .*\(byte ({end}|{end + 512}) of"):
        index_shards([str(tmp_path / "a.tar")])


@pytest.mark.parametrize("format", ["0.0", "0.1", "1.0"])
def test_sparse_members_are_left_out_and_the_others_keep_their_places(tmp_path: Path, format: str):
    """Sparse members as GNU tar writes them (its manual, D.1): holes are not stored, only a map of the rest."""
    content, size = b"d" * 512, "2048"
    headers = {"GNU.sparse.size": size, "GNU.sparse.numblocks": "1"}
    if format == "0.0":
        headers |= {"GNU.sparse.offset": "0", "GNU.sparse.numbytes": "512"}
    elif format == "0.1":
        headers |= {"GNU.sparse.map": "0,512", "GNU.sparse.name": "00001.txt"}
    else:
        headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "00001.txt"}
        headers |= {"GNU.sparse.realsize": size}
        content = b"1\n0\n512\n".ljust(512, b"\0") + content
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            for kind in ("jpg", "txt"):
                sparse = (i, kind) == (1, "txt")
                raw = content if sparse else f"{i} {kind}".encode()
                info = tarfile.TarInfo(f"{i:05d}.{kind}")
                info.size = len(raw)
                info.pax_headers = headers if sparse else {}
                tar.addfile(info, io.BytesIO(raw))
    samples = index_shards([str(tmp_path / "a.tar")])
    assert samples.ignored == {"not_a_plain_file": 1} and samples.dropped == {"no_text": 1}
    assert [samples.read(i) for i in (0, 1)] == [{"jpg": b"0 jpg", "txt": b"0 txt"}, {"jpg": b"2 jpg", "txt": b"2 txt"}]


def test_an_index_that_points_outside_its_shard_makes_bad_samples(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(whole(tarfile.USTAR_FORMAT, "together", 0))
    samples = index_shards([str(tmp_path / "a.tar")])
    for offset, size in ((10**12, 5), (0, 10**18), (0, -5), (-5, 5), (2**62, 2**62)):
        samples.members[:, 1:] = np.array([offset, size])
        with pytest.raises(BadSample, match=r"read_error|short_read"):
            samples.read(0)


def test_a_payload_that_changed_reads_as_its_own_bytes_or_is_dropped(tmp_path: Path):
    raw = bytearray(whole(tarfile.USTAR_FORMAT, "together", 0))
    raw[raw.index(text(2)) + 3] ^= 0x80
    (tmp_path / "a.tar").write_bytes(raw)
    samples = index_shards([str(tmp_path / "a.tar")])
    with pytest.raises(BadSample, match="bad_utf8"):
        captions_of(samples.read(2))
    assert "\ufffd" in captions_of(samples.read(2), "replace")[0]
    assert decode_rgb(samples.read(2)["jpg"], 10_000).shape == (20, 24, 3)
