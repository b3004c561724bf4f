"""One shard's bytes to the list of its samples, from the tar headers alone."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clipft.data.sample import IMAGE_KINDS, TEXT_KINDS
from clipft.data.tail import BLOCK, judge_zeros

MAGIC_AT, MAGIC = 257, b"ustar"  # in a header, of ustar, GNU and PAX archives alike
KINDS = frozenset(IMAGE_KINDS + TEXT_KINDS)
ENDS_IN_DATA = KINDS - {"bmp", "tif", "tiff", "ppm", "pgm"}  # the others may end in black pixels
FEW = 16  # zeros that a picture may end in by chance
END_MARKS = (b"\xff\xd9", b"IEND\xaeB`\x82", b";")  # of JPEG, PNG and GIF; some writers add zeros behind them
# webdataset skips these names too (tariterators.tar_file_iterator, skip_meta).
META_NAME = re.compile(r"__[^/]*__($|/)")


Group = dict[str, tuple[int, int]]  # kind -> (offset, size)
Places = list[tuple[int, str]]  # bytes, and what is there


@dataclass(frozen=True)
class ShardIndex:
    """What one shard holds. Samples are in the order in which their first members come in the tar."""

    size: int
    mtime_ns: int
    keys: list[str]
    num_members: list[int]
    """Members of each sample; the next three lists have one entry per member, sample after sample."""
    kinds: list[str]
    offsets: list[int]
    sizes: list[int]
    dropped: dict[str, dict[str, int]]
    """Reason -> samples that cannot be used, as key -> byte of the first header."""
    ignored: dict[str, int]
    """Reason -> number of members that belong to no sample."""
    problems: Places
    """Damage, as (byte, what is wrong there); empty for a whole shard."""
    doubts: Places
    """What is found in whole shards too, but seldom, and where the last samples of a shard are lost."""


# What tarfile raises over headers that do not make sense: sizes of exabytes, thousands of names for one member.
HEADER_ERRORS = (tarfile.TarError, ValueError, LookupError, OverflowError, OSError, MemoryError, RecursionError)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension, cut at the first dot of the base name; None for a name without them.

    That is webdataset's rule. Where it gives an extension that nobody reads ("IMG_1.5x.jpg": "5x.jpg")
    but the last part is one we know, the cut is made there.
    """
    base = name.rpartition("/")[2]
    first, _, kind = base.partition(".")
    if not first or not kind:
        return None
    last = kind.lower().rpartition(".")[2]
    if kind.lower() not in KINDS and last in KINDS:
        kind = last
    return name[: -len(kind) - 1], kind.lower()


def verdict(group: Group, repeated: bool) -> str | None:
    """Why a group of members is no usable sample; None when it is one."""
    if repeated:
        return "duplicate_key"
    if not any(kind in IMAGE_KINDS for kind in group):
        return "no_image"
    return None if any(kind in TEXT_KINDS for kind in group) else "no_text"


def why_ignored(member: tarfile.TarInfo) -> str | None:
    """Why a member can belong to no sample whatever its name; None when it may."""
    if not member.isreg() or member.issparse():
        return "folder" if member.isdir() else "not_a_plain_file"
    return "meta" if META_NAME.match(member.name) else None


def scan_shard(path: str | Path) -> ShardIndex:
    """The index of the shard as its bytes are now, read from the headers alone."""
    groups: dict[str, Group] = {}
    starts: dict[str, int] = {}
    repeated: dict[str, list[int]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    ignored: dict[str, int] = {}
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        members, problems = read_headers(file, stat.st_size)
        end_problems, doubts = ([], []) if problems else check_end(file, members)
    for member in members:
        name = split_name(member.name)
        reason = why_ignored(member)
        if reason or name is None:
            ignored[reason or "no_extension"] = ignored.get(reason or "no_extension", 0) + 1
            continue
        key, kind = name
        seen[key, kind] += 1
        if seen[key, kind] > 1 + len(repeated.get(key, [])):
            repeated.setdefault(key, []).append(member.offset)
        groups.setdefault(key, {})[kind] = (member.offset_data, member.size)
        starts.setdefault(key, member.offset)
    good, bad, num_extra = sort_groups(groups, repeated.keys())
    dropped = {reason: {key: starts[key] for key in keys} for reason, keys in bad.items()}
    for key in bad.get("duplicate_key", []):
        dropped["duplicate_key"] |= {f"{key} ({n})": start for n, start in enumerate(repeated[key], 2)}
    return ShardIndex(
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        keys=list(good),
        num_members=[len(group) for group in good.values()],
        kinds=[kind for group in good.values() for kind in group],
        offsets=[offset for group in good.values() for offset, _ in group.values()],
        sizes=[size for group in good.values() for _, size in group.values()],
        dropped=dropped,
        ignored=ignored | ({"extra": num_extra} if num_extra else {}),
        problems=problems + end_problems,
        doubts=doubts,
    )


def sort_groups(
    groups: dict[str, Group], repeated: Collection[str]
) -> tuple[dict[str, Group], dict[str, list[str]], int]:
    """Usable samples, keys of the others by reason, and the number of members beside a usable sample.

    "a.mask.png" beside a whole sample "a" is such a member, not a broken sample "a.mask".
    """
    reasons = {key: verdict(group, key in repeated) for key, group in groups.items()}
    bad: dict[str, list[str]] = {}
    num_extra = 0
    for key, reason in reasons.items():
        folder, slash, base = key.rpartition("/")
        owner = folder + slash + base.partition(".")[0]
        if reason and owner != key and reasons.get(owner, "absent") is None:
            num_extra += len(groups[key])
        elif reason:
            bad.setdefault(reason, []).append(key)
    return {key: groups[key] for key, reason in reasons.items() if not reason}, bad, num_extra


def read_headers(file: BinaryIO, size: int) -> tuple[list[tarfile.TarInfo], Places]:
    """All whole members (ustar, GNU and PAX names resolved), and what is wrong with the archive."""
    if size == 0:
        return [], [(0, "the file is empty")]
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
    except HEADER_ERRORS as error:
        file.seek(0)
        head = file.read(BLOCK)
        if head[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC:
            return [], [(0, f"damaged header ({error})")]
        return [], [(0, f"not a tar archive ({error}); it begins with {head[:16]!r}")]
    members: list[tarfile.TarInfo] = []
    while not members or tar.offset <= size:  # the first one is read already
        try:
            member = tar.next()
        except HEADER_ERRORS as error:
            return members, [(tar.offset, f"damaged header ({str(error) or type(error).__name__})")]
        if member is None:
            break
        if member.size < 0:
            return members, [(member.offset, f"damaged header of {member.name!r} (size {member.size})")]
        end = member.offset_data + (member.size if member.isreg() and not member.issparse() else 0)
        if end > size:
            what = f"the data of {member.name!r} should run to byte {end}, the file ends at byte {size}"
            return members, [(member.offset_data, what)]
        members.append(member)
    file.seek(min(tar.offset, size))  # where tarfile stopped
    return members, []


def check_end(file: BinaryIO, members: list[tarfile.TarInfo]) -> tuple[Places, Places]:
    """Problems and doubts from where the file stands on, where tarfile stopped: at anything but a header."""
    offset = file.tell()
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        what = "cut inside a header" if block else "cut between two members: no end-of-archive block"
        return [(offset, what)], []
    if block.strip(b"\0"):
        return [(offset, "damaged header")], []
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            start = file.tell() - len(chunk.lstrip(b"\0"))
            return [(start, f"more data behind the end-of-archive block at byte {offset}")], []
    size = file.tell()
    zeroed = members[-1] if members and ends_in_zeros(file, members[-1]) else None
    hopeless = not members if zeroed is None else kind_of(zeroed) in TEXT_KINDS
    what, is_damage = judge_zeros(size - offset, size, zeroed.name if zeroed else None, hopeless)
    said = [(offset, what)] if what else []
    return (said, []) if is_damage else ([], said)


def ends_in_zeros(file: BinaryIO, member: tarfile.TarInfo) -> bool:
    """Whether the last block of a text or a compressed picture is zeros: disks and copies lose whole blocks."""
    kind, end = kind_of(member), member.offset_data + member.size
    if kind not in ENDS_IN_DATA or why_ignored(member) or not member.size:
        return False
    file.seek(start := (end - 1) // BLOCK * BLOCK)
    last = file.read(end - start)
    if last.strip(b"\0") or kind in TEXT_KINDS:
        return not last.strip(b"\0")
    file.seek(member.offset_data)
    return len(last) >= FEW and not file.read(member.size).rstrip(b"\0").endswith(END_MARKS)


def kind_of(member: tarfile.TarInfo) -> str:
    return (split_name(member.name) or ("", ""))[1]
