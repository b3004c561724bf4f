"""The bounded cache: one copy of each shard, whole, for all processes of a machine."""

import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flaky import Fail, Site, site
from shards import pairs, write_tar

from clipft.data.manifest import sha256_of
from clipft.data.remote.cache import (
    Cache,
    DownloadFailed,
    RemoteShard,
    contents,
    hold,
    place_in,
    settled,
)
from clipft.data.remote.fetch import NotFetched
from clipft.data.shard import scan_shard

SIZE = 10240  # of each of the shards below


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Site]:
    for n in range(5):
        write_tar(tmp_path / f"www/{n}.tar", pairs(n, 2))
    with site(tmp_path / "www") as here:
        yield here


def cache(web: Site, limit: int = 1 << 30) -> Cache:
    return Cache(web.folder.parent / "cache", limit, web.patience())


def shard(web: Site, n: int, here: Cache) -> RemoteShard:
    """As shards.json lists it, with its index."""
    file = web.folder / f"{n}.tar"
    address = f"{web.url}/{n}.tar"
    found = RemoteShard(address, place_in(here.folder, address), file.stat().st_size, sha256_of(file))
    return settled(replace(found, index=scan_shard(file)))


def files(here: Cache) -> list[str]:
    return sorted(path.name for path in here.folder.glob("*/*") if path.name != ".lock")


def read(here: Cache, each: RemoteShard) -> bytes:
    with here.held(each) as path:
        return Path(path).read_bytes()


def test_a_shard_comes_once_whole_under_its_own_name(web: Site):
    here = cache(web)
    one = shard(web, 0, here)
    assert not here.has(one)
    for _ in range(3):
        assert read(here, one) == (web.folder / "0.tar").read_bytes()
    assert web.count("/0.tar") == 1 and files(here) == ["0.tar"] and here.has(one)


def test_equal_names_on_different_hosts_are_different_shards(tmp_path: Path):
    folder = tmp_path / "cache"
    places = {place_in(folder, f"https://{host}/0.tar") for host in ("a.org", "b.org/x", "b.org/y")}
    assert len(places) == 3 and {Path(place).name for place in places} == {"0.tar"}


def test_nothing_wrong_gets_a_name(web: Site):
    here = cache(web)
    web.always["/0.tar"] = Fail(body=b"x" * SIZE)
    web.always["/1.tar"] = Fail(cut=700)
    web.always["/2.tar"] = Fail(status=404)
    for n, says in enumerate(("sha256", r"700 bytes came, 10,240 are expected|10,240 bytes", "HTTP 404")):
        with pytest.raises(DownloadFailed, match=rf"{web.url}/{n}\.tar cannot be read: .*({says})"):
            read(here, shard(web, n, here))
    assert files(here) == []


def test_without_checksum_the_bytes_are_compared_with_the_index(web: Site):
    here = cache(web)
    one = replace(shard(web, 0, here), sha256=None)
    one = settled(one)
    assert read(here, one) == (web.folder / "0.tar").read_bytes()
    two = settled(replace(one, address=f"{web.url}/1.tar", path=place_in(here.folder, "other")))
    with pytest.raises(DownloadFailed, match="not those that its index was made of"):
        read(here, two)


def test_a_cached_file_of_other_bytes_is_brought_again(web: Site):
    here = cache(web)
    one = shard(web, 0, here)
    read(here, one)
    Path(one.path).write_bytes(b"x" * SIZE)
    assert read(here, one) == (web.folder / "0.tar").read_bytes() and web.count("/0.tar") == 2
    write_tar(web.folder / "0.tar", pairs(7, 2))
    assert len(read(here, shard(web, 0, here))) == SIZE and web.count("/0.tar") == 3


def test_reading_a_shard_without_checksum_hashes_its_index_no_more(web: Site, monkeypatch: pytest.MonkeyPatch):
    here = cache(web)
    one = settled(replace(shard(web, 0, here), sha256=None))
    read(here, one)
    monkeypatch.setattr(hashlib, "sha256", None)
    here.touch([one])
    assert here.has(one) and read(here, one) == (web.folder / "0.tar").read_bytes()


def test_a_cached_file_of_other_bytes_does_not_become_the_wanted_one_by_being_needed_soon(web: Site):
    here = cache(web)
    old = shard(web, 0, here)
    read(here, old)
    write_tar(web.folder / "0.tar", pairs(7, 2))
    new = shard(web, 0, here)
    assert old.index is not None and new.index is not None and old.index.size == new.index.size
    here.touch([new])
    assert not here.has(new) and read(here, new) == (web.folder / "0.tar").read_bytes()


def test_what_was_not_used_for_longest_goes_and_the_bound_holds(web: Site):
    here = cache(web, limit=3 * SIZE)
    shards = [shard(web, n, here) for n in range(5)]
    for n in (0, 1, 2, 0, 3):
        read(here, shards[n])
        assert contents(here.folder, None)[1] <= 3 * SIZE
    assert files(here) == ["0.tar", "2.tar", "3.tar"]


def test_what_will_be_needed_first_goes_last(web: Site):
    here = cache(web, limit=3 * SIZE)
    shards = [shard(web, n, here) for n in range(5)]
    for n in (0, 1, 2):
        read(here, shards[n])
    here.touch([shards[1], shards[0]])
    read(here, shards[3])
    assert files(here) == ["0.tar", "1.tar", "3.tar"]
    read(here, shards[4])
    assert files(here) == ["1.tar", "3.tar", "4.tar"]


def test_what_is_being_read_never_goes(web: Site):
    here = cache(web, limit=2 * SIZE)
    shards = [shard(web, n, here) for n in range(3)]
    with here.held(shards[0]), here.held(shards[1]):
        started = time.monotonic()
        naps = []

        def nap(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 3:
                raise InterruptedError  # it would wait on

        full = replace(here, patience=replace(here.patience, sleep=nap))
        with pytest.raises(InterruptedError):
            full.bring(shards[2])
        assert files(here) == ["0.tar", "1.tar"] and time.monotonic() - started < 5
    read(here, shards[2])
    assert files(here) == ["1.tar", "2.tar"]


def test_what_comes_ahead_of_need_takes_no_room_from_what_was_used_since(web: Site):
    here = cache(web, limit=2 * SIZE)
    shards = [shard(web, n, here) for n in range(3)]
    began = time.time()
    read(here, shards[0])
    read(here, shards[1])
    assert here.bring(shards[2], older_than=began) is None and files(here) == ["0.tar", "1.tar"]
    assert here.bring(shards[2], older_than=time.time() + 1) is not None and files(here) == ["1.tar", "2.tar"]


def test_a_shard_larger_than_the_cache_is_refused_with_both_sizes(web: Site):
    here = cache(web, limit=SIZE - 1)
    with pytest.raises(ValueError, match=r"data\.cache_size=10,239 bytes is less than one shard, .*10,240"):
        here.bring(shard(web, 0, here))


def test_other_files_in_a_folder_that_the_user_names_are_not_the_caches_own(web: Site):
    here = cache(web, limit=SIZE)
    (here.folder / "photos").mkdir(parents=True)
    (here.folder / "photos/mine.jpg").write_bytes(bytes(100 * SIZE))
    (here.folder / "0.tar").write_bytes(bytes(100 * SIZE))
    for n in range(3):
        read(here, shard(web, n, here))
    assert (here.folder / "photos/mine.jpg").is_file() and (here.folder / "0.tar").is_file()


def test_a_shard_without_known_size_is_indexed_as_it_comes(web: Site):
    here = cache(web, limit=2 * SIZE)
    web.always["/0.tar"] = Fail(length=False)
    address = f"{web.url}/0.tar"
    found = here.bring(RemoteShard(address, place_in(here.folder, address)))
    assert found is not None and found.index is not None
    assert (found.size, found.sha256) == (SIZE, sha256_of(web.folder / "0.tar"))
    assert found.index.keys == scan_shard(web.folder / "0.tar").keys and here.has(found)


def test_a_tar_that_ends_in_the_middle_without_length_is_not_indexed(web: Site):
    here = cache(web)
    web.ranges, web.always["/0.tar"] = False, Fail(length=False, cut=700)
    address = f"{web.url}/0.tar"
    with pytest.raises(NotFetched, match=r"should run to byte.*after 4 attempts"):
        here.bring(RemoteShard(address, place_in(here.folder, address)))
    assert files(here) == []


@pytest.mark.fault
def test_a_full_disk_is_said_with_what_to_do(web: Site, tmp_path: Path):
    (tmp_path / "cache").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", tmp_path / "cache"], capture_output=True)
    if done.returncode:
        pytest.skip("mount needs root")
    try:
        here = cache(web)
        with pytest.raises(DownloadFailed, match=r"the disk of data\.cache_dir=.* is full .*No space left"):
            read(here, shard(web, 0, here))
        assert files(here) == []
    finally:
        subprocess.run(["umount", tmp_path / "cache"], check=True)


DOWNLOAD = """
import sys
from dataclasses import replace
from pathlib import Path
from clipft.data.manifest import sha256_of
from clipft.data.remote.cache import Cache, RemoteShard, place_in
folder, address, size, sha256 = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
print("begins", flush=True)
Cache(folder, 1 << 30).bring(RemoteShard(address, place_in(folder, address), size, sha256))
"""


@pytest.mark.process
def test_a_kill_in_the_middle_of_a_download_leaves_no_shard_and_no_lock(web: Site):
    here = cache(web)
    one = shard(web, 0, here)
    web.fails["/0.tar"] = [Fail(cut=9000, hold_s=30)]
    job = [sys.executable, "-c", DOWNLOAD, str(here.folder), one.address, str(one.size), str(one.sha256)]
    with subprocess.Popen(job, stdout=subprocess.PIPE) as process:
        part = Path(one.path).parent / f".{SIZE}.part"
        deadline = time.monotonic() + 30
        while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert files(here) == [f".{SIZE}.part"] and not here.has(one)
    began = time.monotonic()
    assert read(here, one) == (web.folder / "0.tar").read_bytes()
    assert files(here) == ["0.tar"] and time.monotonic() - began < 5


def test_what_a_killed_process_left_takes_no_room(web: Site):
    here = cache(web, limit=SIZE)
    left = Path(shard(web, 0, here).path).parent
    left.mkdir(parents=True)
    (left / ".lock").touch()
    (left / f".{SIZE}.part").write_bytes(b"half")
    read(here, shard(web, 1, here))
    assert files(here) == ["1.tar"]


def read_in_turn(here: Cache, shards: list[RemoteShard], seed: int) -> None:
    for n in range(20):
        each = shards[(n * seed) % len(shards)]
        with here.held(each) as path:
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == each.sha256


@pytest.mark.process
def test_processes_that_share_a_cache_bring_each_shard_once_while_it_has_room_and_read_right_where_not(web: Site):
    fork = multiprocessing.get_context("fork")
    for limit, most in ((5 * SIZE, 1), (3 * SIZE, 200)):
        here = Cache(web.folder.parent / f"cache-{limit}", limit)
        shards = [shard(web, n, here) for n in range(5)]
        jobs = [fork.Process(target=read_in_turn, args=(here, shards, seed)) for seed in (1, 2, 3)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
        assert [job.exitcode for job in jobs] == [0, 0, 0]
        assert all(web.count(f"/{n}.tar") <= most for n in range(5)) and contents(here.folder, None)[1] <= limit
        web.asked.clear()


def test_a_lock_that_is_held_says_that_this_process_lives(web: Site):
    here = cache(web)
    one = shard(web, 0, here)
    Path(one.path).parent.mkdir(parents=True)
    beats = []
    with (Path(one.path).parent / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def beat() -> None:
            beats.append(1)
            fcntl.flock(other, fcntl.LOCK_UN)

        replace(here, beat=beat).bring(one)
    fd = hold(one)
    assert beats and fd is not None
    os.close(fd)
