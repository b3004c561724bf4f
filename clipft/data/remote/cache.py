"""A folder of whole shards from elsewhere, bounded in bytes, that all processes of a machine share.

A shard comes into a temporary file, is checked and renamed. Whoever brings one holds the lock of its folder, so that
nobody brings it twice; whoever reads one holds a lock on the file, so that nobody takes it away. Locks are the kernel's
(flock): they go with their process, however it ends.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from clipft.data.manifest import sha256_of
from clipft.data.remote.addresses import name_of, shown
from clipft.data.remote.fetch import CHANGED, Fetch, NotFetched, Patience, nothing
from clipft.data.shard import ShardIndex, scan_shard
from clipft.report import RunFailed

PART = ".part"
DAMAGED = "Nothing of a damaged shard is used: write it again where it lies, or leave it out."
POLL_S = 0.1
OLDEST_S = 1_000_000_000  # begins the times that stand for content
MOST_ROUNDS = 20
HOME = re.compile(r"[0-9a-f]{20}")  # a shard's folder; a cache folder that the user names may hold other things
ROOM_S = 600.0  # that another process may keep the room that is waited for


class DownloadFailed(RunFailed):
    """A shard could not be had while it was needed."""

    def __init__(self, message: str):
        # torch wraps what a loader process raises into its traceback; the last line is what was said.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class RemoteShard:
    """A shard that lies elsewhere, and what is known of it."""

    address: str
    path: str
    """Its place in the cache."""
    size: int | None = None
    sha256: str | None = None
    samples: int | None = None
    """As shards.json beside it lists them; what was found in a full read."""
    index: ShardIndex | None = None
    """With the time that its file in the cache bears (`settled`)."""


def settled(shard: RemoteShard) -> RemoteShard:
    """The shard with the time in its index that its file in the cache bears: whole seconds that stand for the content,
    so that a file with other bytes is told from it by its time alone."""
    assert shard.index is not None
    digest = shard.sha256
    if digest is None:
        digest = hashlib.sha256(json.dumps(asdict(replace(shard.index, mtime_ns=0))).encode()).hexdigest()
    mtime_ns = (OLDEST_S + int(digest[:7], 16)) * 1_000_000_000
    return replace(shard, index=replace(shard.index, mtime_ns=mtime_ns))


def place_in(folder: Path, address: str) -> str:
    """Where a shard lies in the cache: named by its whole address, as many servers have a 00000.tar."""
    digest = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    return str(folder / digest / name_of(address))


@dataclass
class Cache:
    folder: Path
    limit: int
    """Bytes of all shards in it."""
    patience: Patience = field(default_factory=Patience)
    beat: Callable[[], None] = nothing
    """Called while something comes."""

    @contextmanager
    def held(self, shard: RemoteShard) -> Iterator[str]:
        """The shard's file, brought where it is not there; nobody takes it away before the end."""
        for _ in range(MOST_ROUNDS):
            if (fd := hold(shard)) is not None:
                break
            try:
                self.bring(shard)
            except NotFetched as error:
                raise DownloadFailed(str(error)) from error
        else:
            raise DownloadFailed(
                f"{shown(shard.address)} was brought {MOST_ROUNDS} times and always taken away before it was read. "
                "Another run may use the same cache for another version of it: give one of them another data.cache_dir."
            )
        try:
            yield shard.path
        finally:
            os.close(fd)

    def has(self, shard: RemoteShard) -> bool:
        """Whether the shard lies there, with the bytes that are wanted."""
        with suppress(OSError):
            return fits(os.stat(shard.path), shard)
        return False

    def bring(self, shard: RemoteShard, older_than: float | None = None) -> RemoteShard | None:
        """Brings the shard, unless it is there; returns what is known of it then.

        With `older_than` (seconds) it only takes room that nothing else needs: None where another process brings it,
        or where the room holds shards that were used since.
        """
        home = Path(shard.path).parent
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / ".lock", self.beat, wait=older_than is None) as mine:
            if not mine:
                return None
            if shard.index is not None and self.has(shard):
                return shard
            part = self.make_room(shard, older_than)
            if part is None:
                return None
            try:
                return self.fill(shard, part)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise self.full(error) from error
            finally:
                with suppress(FileNotFoundError):
                    part.unlink()

    def fill(self, shard: RemoteShard, part: Path) -> RemoteShard:
        """Brings the bytes into the temporary file, checks them and gives them their name."""
        known = [shard]

        def wrong() -> str:
            file.flush()
            known[0], what = examined(shard, part)
            return what

        with part.open("wb") as file:
            unknown = shard.index is None and shard.sha256 is None
            Fetch(shard.address, file, shard.size, self.patience, self.beat).run(wrong, DAMAGED if unknown else CHANGED)
        found = known[0]
        assert found.index is not None
        os.utime(part, ns=(time.time_ns(), found.index.mtime_ns))
        with locked(self.folder / ".lock"):
            self.evict(0 if shard.size is not None else part.stat().st_size, None, besides=part)
            os.replace(part, shard.path)
        return found

    def make_room(self, shard: RemoteShard, older_than: float | None) -> Path | None:
        """An empty temporary file for the shard, whose name reserves its bytes; None where there is no room now."""
        size = shard.size or 0
        if size > self.limit:
            raise ValueError(
                f"data.cache_size={self.limit:,} bytes is less than one shard, {shown(shard.address)} with {size:,}."
            )
        home, deadline = Path(shard.path).parent, time.monotonic() + ROOM_S
        while True:
            with locked(self.folder / ".lock"):
                for left in home.glob(f".*{PART}"):  # of a process that was killed: we have its lock
                    left.unlink()
                if self.evict(size, older_than):
                    part = home / f".{size}{PART}"
                    part.touch()
                    return part
            if older_than is not None:
                return None
            if time.monotonic() > deadline:
                raise DownloadFailed(
                    f"{self.folder} has been full for {ROOM_S:g} s with shards that are read or downloaded, and there "
                    f"is no room for {shown(shard.address)}. Raise data.cache_size or lower data.workers."
                )
            self.patience.sleep(POLL_S)
            self.beat()

    def evict(self, size: int, older_than: float | None, besides: Path | None = None) -> bool:
        """Takes away what was not used for longest until there is room for so many bytes; whether there is.

        Nothing that is being read, and nothing used after `older_than`.
        """
        there, used = contents(self.folder, besides)
        for used_s, path, bytes_there in sorted(there):
            if used + size <= self.limit:
                return True
            if (older_than is None or used_s < older_than) and taken_away(path):
                used -= bytes_there
        return used + size <= self.limit

    def touch(self, shards: list[RemoteShard]) -> None:
        """Notes that these will be used, the first of them first."""
        for shard in reversed(shards):
            with suppress(OSError):
                if (fd := hold(shard)) is not None:
                    os.close(fd)

    def full(self, error: OSError) -> RunFailed:
        free = shutil.disk_usage(self.folder).free
        return DownloadFailed(
            f"the disk of data.cache_dir={self.folder} is full ({free:,} bytes free) before data.cache_size="
            f"{self.limit:,} bytes is reached: {error.strerror}. Make room, lower data.cache_size, or give another "
            "data.cache_dir."
        )


def examined(shard: RemoteShard, part: Path) -> tuple[RemoteShard, str]:
    """What is known of the shard now that its bytes are here, and what is wrong with them ("": nothing)."""
    size, digest = part.stat().st_size, sha256_of(part)
    if shard.sha256 is not None:
        if digest != shard.sha256:
            return shard, f"{size:,} bytes came with sha256 {digest[:12]}..., {shard.sha256[:12]}... is expected"
        if shard.index is not None:
            return shard, ""
    found = scan_shard(part)
    if shard.index is None:
        return settled(replace(shard, size=size, sha256=digest, index=found)), "; ".join(
            f"{what} (byte {byte} of {size})" for byte, what in found.problems[:1]
        )
    same = replace(found, mtime_ns=shard.index.mtime_ns) == shard.index
    return shard, "" if same else "the bytes that came are not those that its index was made of"


def fits(stat: os.stat_result, shard: RemoteShard) -> bool:
    index = shard.index
    return index is not None and (stat.st_size, stat.st_mtime_ns) == (index.size, index.mtime_ns)


def hold(shard: RemoteShard) -> int | None:
    """A descriptor of the shard's file with a lock that keeps it there; None where it is not there, or another one."""
    try:
        fd = os.open(shard.path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    stat = os.fstat(fd)
    if stat.st_nlink and fits(stat, shard):  # else it was taken away before it was locked
        os.utime(fd, ns=(time.time_ns(), stat.st_mtime_ns))
        return fd
    os.close(fd)
    return None


def taken_away(path: Path) -> bool:
    """Deletes a shard that nobody reads; whether it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def contents(folder: Path, besides: Path | None) -> tuple[list[tuple[float, Path, int]], int]:
    """The shards in the cache with the time of their last use and their bytes; bytes of all, with those to come."""
    there, used = [], 0
    for home in folder.iterdir():
        ours = HOME.fullmatch(home.name) and (home / ".lock").is_file()
        for path in home.iterdir() if ours else ():
            if path == besides or path.name == ".lock":
                continue
            with suppress(FileNotFoundError):
                stat = path.stat()
                if path.name.endswith(PART):
                    used += part_size(path, stat.st_size)
                else:
                    there.append((stat.st_atime, path, stat.st_size))
                    used += stat.st_size
    return there, used


def part_size(part: Path, size: int) -> int:
    """Bytes to count for a temporary file; one whose process is gone is deleted."""
    with locked(part.parent / ".lock", wait=False) as orphan:
        if orphan:
            part.unlink(missing_ok=True)
            return 0
    reserved = part.name.removeprefix(".").removesuffix(PART)
    return max(size, int(reserved) if reserved.isdigit() else 0)


@contextmanager
def locked(file: Path, beat: Callable[[], None] = nothing, wait: bool = True) -> Iterator[bool]:
    """Whether this lock is held inside; without `wait` it may not be."""
    with file.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    yield False
                    return
            time.sleep(POLL_S)
            beat()
        yield True


@dataclass
class Remote:
    """The shards of a data set that lie elsewhere, and the cache that they are brought to."""

    cache: Cache
    shards: dict[str, RemoteShard] = field(default_factory=dict)
    """By their place in the cache."""
    kept: list[RemoteShard] = field(default_factory=list)
    """Others that are read again and again beside them, and go later than what nobody needs any more."""
    allow_pipe: bool = False
    """Whether the config that names them has data.allow_pipe."""
    mirrored: set[str] = field(default_factory=set)
    """Folders elsewhere whose small files were read just now."""

    def add(self, shard: RemoteShard) -> str:
        """Notes the shard; returns its place in the cache."""
        self.shards.setdefault(shard.path, shard)
        return shard.path

    def index(self, path: str) -> ShardIndex | None:
        """The index of a shard that lies elsewhere; None for any other path."""
        return self.shards[path].index if path in self.shards else None
