"""The indexes of shards that lie elsewhere: stored ones, those beside the shards, else one full read of each."""

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from clipft.data.index import index_text, parse_index, refuse_damage
from clipft.data.progress import Progress
from clipft.data.remote.addresses import PIPE, name_of, shown
from clipft.data.remote.body import Fault
from clipft.data.remote.cache import Cache, DownloadFailed, Remote, RemoteShard, settled
from clipft.data.remote.fetch import NotFetched, Patience, fetch_small, open_body
from clipft.data.shard import ShardIndex
from clipft.data.workers import map_items
from clipft.files import replace_file, user_cache
from clipft.report import megabytes

AT_ONCE = 8  # small files
READERS = 4  # processes that read whole shards

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Told:
    """What a server says of a file without sending it."""

    size: int | None
    stamp: str | None
    refused: str = ""
    """Why it will not send it."""


def learn(remote: Remote, workers: int | None = None, again: bool = False) -> list[RemoteShard]:
    """Fills in the index of every shard; returns those that had to be read whole for it, by up to `workers` processes.

    With `again` it also asks for each indexed shard whether it is still the one that was indexed.
    """
    open_ = [shard for shard in remote.shards.values() if shard.index is None]
    found = at_once(partial(known, patience=remote.cache.patience, again=again), open_)
    new = [shard for shard, index in zip(open_, found, strict=True) if index is None]
    found = [shard for shard in found if shard is not None] + read_whole(
        remote.cache, new, READERS if workers is None else min(workers, READERS)
    )
    remote.shards |= {shard.path: shard for shard in found}
    shards = [shard for shard in found if shard.index is not None]
    refuse_damage([shown(shard.address) for shard in shards], [shard.index for shard in shards if shard.index])
    return new


def at_once(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """The function's result for each item; it waits for a server most of the time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, items))


def known(shard: RemoteShard, patience: Patience, again: bool) -> RemoteShard | None:
    """The shard with its index, from this machine or from beside the shard; None where there is none that fits."""
    if found := from_record(shard, patience if again else None):
        return found
    if shard.address.startswith(PIPE) or "?" in shard.address:
        return None
    try:
        raw = fetch_small(shard.address + ".index.json", patience, lambda _: "")
    except NotFetched as error:
        raise DownloadFailed(str(error)) from error
    index = parse_index(raw.decode("utf-8", "replace")) if raw is not None else None
    if index is None or not is_sound(index) or shard.size not in (None, index.size):
        return None
    found = settled(replace(shard, size=index.size, index=index))
    write_record(found, None)
    return found


def is_sound(index: ShardIndex) -> bool:
    """Whether an index that another machine wrote has the shape of one; its numbers are compared with the shard."""
    counts, members = index.num_members, (index.kinds, index.offsets, index.sizes)
    numbers = [index.size, *counts, *index.offsets, *index.sizes]
    return (
        all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        and len(index.keys) == len(counts)
        and all(len(each) == sum(counts) for each in members)
        and all(isinstance(text, str) for text in (*index.keys, *index.kinds))
        and all(isinstance(bad, dict) and bad for bad in index.dropped.values())
        and isinstance(index.ignored, dict)
    )


def record_place(address: str) -> Path:
    digest = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    return user_cache() / "index" / f"{digest}-{name_of(address)}.remote"


def from_record(shard: RemoteShard, ask: Patience | None) -> RemoteShard | None:
    """The shard as it was stored on this machine, unless it is listed otherwise or, where it is asked, changed."""
    try:
        head, _, text = record_place(shard.address).read_text("utf-8").partition("\n")
        about = json.loads(head)
        sha256, stamp = about["sha256"], about["stamp"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    index = parse_index(text)
    if index is None or shard.size not in (None, index.size) or shard.sha256 not in (None, sha256):
        return None
    if ask is not None and shard.sha256 is None and not shard.address.startswith(PIPE):
        told = ask_for(shard.address, ask)
        if told.size not in (None, index.size) or (stamp is not None and told.stamp != stamp):
            return None
    return settled(replace(shard, size=index.size, sha256=sha256, index=index))


def write_record(shard: RemoteShard, stamp: str | None) -> None:
    """Stores the index with the checksum of the shard, where it is known, and what the server says of it."""
    assert shard.index is not None
    head = json.dumps({"sha256": shard.sha256, "stamp": stamp})
    place = record_place(shard.address)
    with suppress(OSError):  # a read-only or full place: it is asked for at each start
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, f"{head}\n{index_text(shard.index)}")


def ask_for(address: str, patience: Patience) -> Told:
    """Size and stamp of a file; nothing where the server does not say."""
    if address.startswith(PIPE):
        return Told(None, None)
    try:
        body = open_body(address, 0, patience)
        body.close()
        return Told(body.total, body.stamp)
    except Fault as fault:  # what may pass, the read itself will try again
        return Told(None, None, f"{fault}. {fault.advice}" if fault.final else "")


def read_whole(cache: Cache, shards: list[RemoteShard], workers: int) -> list[RemoteShard]:
    """Brings each shard once, and indexes it; what is done is stored, so that it goes on after a kill."""
    if not shards:
        return []
    told = at_once(partial(ask_for, patience=cache.patience), [shard.address for shard in shards])
    refused = [(shard, each.refused) for shard, each in zip(shards, told, strict=True) if each.refused]
    if refused:
        several = f" {len(refused)} of {len(shards)} shards without index cannot." if refused[1:] else ""
        raise ValueError(f"{shown(refused[0][0].address)} cannot be read: {refused[0][1]}{several}")
    print(announced(shards, told, cache), file=sys.stderr, flush=True)
    sizes = [each.size for each in told]
    amounts = [max(1, round(size / 1e6)) for size in sizes if size is not None]
    whole = len(amounts) == len(shards)
    progress = Progress("reading", "MB", sum(amounts)) if whole else Progress("reading", "shards", len(shards))
    jobs = list(zip(shards, told, strict=True))
    return map_items(
        partial(read_one, cache=cache), jobs, workers, progress, "data.workers", amounts if whole else None
    )


def announced(shards: list[RemoteShard], told: list[Told], cache: Cache) -> str:
    """What is about to be read, and why."""
    sizes = [each.size for each in told if each.size is not None]
    size = megabytes(sum(sizes)) + ("" if len(sizes) == len(told) else " or more") if sizes else "size unknown"
    count = f"{len(shards)} shard{'s' if shards[1:] else ''}"
    return (
        f"{count} ({size}) without index, the first is {shown(shards[0].address)}: read whole once, into "
        f"{cache.folder} (at most {megabytes(cache.limit)} are kept there); their indexes are kept in "
        f"{user_cache() / 'index'}"
    )


def read_one(job: tuple[RemoteShard, Told], cache: Cache) -> RemoteShard:
    """The shard with its index, after it was read to its last byte."""
    shard, told = job
    listed = shard.sha256 is not None
    try:
        found = cache.bring(replace(shard, size=told.size if shard.size is None else shard.size))
    except NotFetched as error:
        if error.final:
            raise ValueError(str(error)) from None
        raise DownloadFailed(str(error)) from None
    assert found is not None and found.index is not None
    write_record(found, None if listed else told.stamp)
    return found
