"""Addresses as a config gives them -> the shards that they stand for; only lists and small texts are read."""

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote

from braceexpand import braceexpand

from clipft.config import DataConfig, num_bytes
from clipft.data.manifest import MANIFEST, SMALL_FILES, Listed, listed_shards
from clipft.data.names import SPLIT_OF, SPLITS, natural, sorted_by_split
from clipft.data.remote.addresses import (
    PACKAGES,
    PIPE,
    beside,
    check_address,
    folder_of,
    name_of,
    scheme_of,
    shown,
)
from clipft.data.remote.cache import Cache, Remote, RemoteShard, place_in
from clipft.data.remote.fetch import NotFetched, Patience, fetch_small
from clipft.files import replace_file, user_cache
from clipft.report import RunFailed


def remote_of(config: DataConfig, patience: Patience | None = None) -> Remote:
    """The cache that the config asks for, nothing in it noted yet; its folder is made when it is needed."""
    folder = Path(config.cache_dir).expanduser() if config.cache_dir else user_cache() / "shards"
    cache = Cache(folder.absolute(), num_bytes("data.cache_size", config.cache_size), patience or Patience())
    return Remote(cache, allow_pipe=config.allow_pipe)


def is_folder(address: str) -> bool:
    """Whether an address names a folder of shards: neither a tar, nor several, nor what a query finds."""
    return not address.startswith(PIPE) and not address.endswith(".tar") and not set(address) & set("{*?")


def expand_remote(key: str, pattern: str, remote: Remote) -> list[str]:
    """Places in the cache of the shards that a folder, braces, a glob, an address or a command stand for."""
    check_address(key, pattern, remote.allow_pipe)
    if is_folder(pattern):
        splits = {split: paths for split, paths in read_remote(key, pattern, remote)[0].items() if paths}
        if len(splits) > 1:
            raise ValueError(
                f"{key}={shown(pattern)} is a folder with splits of its own ({', '.join(splits)}). Write "
                f"data={shown(pattern)} to use them, or name the shards of one split: "
                f"{key}='{shown(pattern).rstrip('/')}/train-{{000..009}}.tar'."
            )
        return [path for paths in splits.values() for path in paths]
    try:
        addresses = list(braceexpand(pattern))
    except ValueError as error:
        shape = "unbalanced braces. Write them as {000..009} or {a,b}."
        raise ValueError(f"{key}={shown(pattern)}: {shape}") from error
    if "*" in pattern and not pattern.startswith(PIPE):
        addresses = [found for each in addresses for found in globbed(key, each)]
    known = listed_about(addresses, remote)
    return [remote.add(shard_at(address, remote, known.get(address))) for address in addresses]


def shard_at(address: str, remote: Remote, listed: Listed | None) -> RemoteShard:
    shard = RemoteShard(address, place_in(remote.cache.folder, address))
    if listed is None:
        return shard
    return RemoteShard(address, shard.path, size=listed.bytes, sha256=listed.sha256, samples=listed.samples)


def globbed(key: str, pattern: str) -> list[str]:
    """The addresses that a glob finds, where the store can list its files."""
    if scheme_of(pattern) not in PACKAGES:
        raise ValueError(f"{key}={shown(pattern)}: http has no list of files. Name them: x-{{000..009}}.tar.")
    names = stored(key, pattern)
    if not names:
        raise ValueError(f"{key}={shown(pattern)} matches no shard.")
    return names


def stored(key: str, pattern: str) -> list[str]:
    """The files of an object store behind a glob, as addresses in natural order."""
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(pattern)
        found = [str(name) for name in store.glob(path)]
    except Exception as error:  # each library has errors of its own, some with signed addresses in their text
        raise RunFailed(
            f"{key}={shown(pattern)} cannot be listed ({type(error).__name__}). See whether this machine has "
            "credentials for it and reaches it."
        ) from error
    return [f"{scheme_of(pattern)}://{name.lstrip('/')}" for name in sorted(found, key=natural)]


def read_remote(key: str, address: str, remote: Remote) -> tuple[dict[str, list[str]], list[str]]:
    """Shards by split of a folder elsewhere, as shards.json or, in an object store, their names say; and notes."""
    check_address(key, address, remote.allow_pipe)
    address = address.rstrip("/") + "/"
    home = mirror(address, remote)
    if (home / MANIFEST).is_file():
        try:
            listed = listed_shards(home)
        except ValueError as error:
            raise ValueError(f"{key}: {shown(beside(address, MANIFEST))} is not a list of shards.") from error
        others = [split for split in listed if split not in SPLITS]
        notes = [f"{shown(address)}: split {split!r} is none of {', '.join(SPLITS)}, not used" for split in others]
        parts = {split: addresses_in(key, address, home, listed.get(split, [])) for split in SPLITS}
        return {
            split: [remote.add(shard_at(each, remote, about)) for each, about in part.items()]
            for split, part in parts.items()
        }, notes
    if scheme_of(address) not in PACKAGES:
        raise ValueError(
            f"{key}={shown(address)}: there is no {MANIFEST}, and http has no other list of files. Put the one that "
            f"clipft data pack wrote there, or name the shards: 'data.train=\"{shown(address)}x-{{000..009}}.tar\"'."
        )
    names = [each.removeprefix(address) for pattern in ("*.tar", "*/*.tar") for each in stored(key, address + pattern)]
    shards = sorted_by_split(names)
    if not any(shards.values()):
        shards["train"] = [name for name in names if "/" not in name]
    if not any(shards.values()):
        raise ValueError(f"{key}={shown(address)} holds neither {MANIFEST} nor a .tar file.")
    return {
        split: [remote.add(shard_at(address + name, remote, None)) for name in part] for split, part in shards.items()
    }, []


def addresses_in(key: str, address: str, home: Path, listed: list[Listed]) -> dict[str, Listed]:
    """The addresses of listed shards; a name that leads out of the folder raises."""
    found = {}
    for each in listed:
        name = each.path.relative_to(home).as_posix() if each.path.is_relative_to(home) else ""
        if not name or ".." in name.split("/"):
            raise ValueError(f"{key}: {shown(beside(address, MANIFEST))} lists a shard outside of its folder.")
        found[address + (name if scheme_of(address) in PACKAGES else quote(name))] = each
    return found


def listed_about(addresses: list[str], remote: Remote) -> dict[str, Listed]:
    """What the shards.json in the folder of each shard, or in the one above train/, says of it."""
    known: dict[str, Listed] = {}
    folders = dict.fromkeys(folder_of(each) for each in addresses if not each.startswith(PIPE) and "?" not in each)
    for folder in dict.fromkeys([each for one in folders for each in (one, home_of_remote(one))]):
        home = mirror(folder, remote)
        with suppress(ValueError):  # another program's file of this name
            for listed in listed_shards(home).values() if (home / MANIFEST).is_file() else ():
                known |= addresses_in("data", folder, home, listed)
    return known


def home_of_remote(address: str) -> str:
    """The folder of the data set that a shard, or its folder, belongs to: its own, or the one above train/."""
    folder = folder_of(address)
    above = folder_of(folder.rstrip("/"))
    return above if name_of(folder.rstrip("/")).lower() in SPLIT_OF else folder


def mirror(address: str, remote: Remote) -> Path:
    """A local folder with the small files of a folder elsewhere, as they are now: its list, class names, templates."""
    home = remote.cache.folder / "sets" / hashlib.sha256(address.encode()).hexdigest()[:20]
    if address in remote.mirrored:
        return home
    home.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        try:
            raw = fetch_small(address + name, remote.cache.patience, partial(cut_off, name))
        except NotFetched as error:
            raise RunFailed(str(error)) from error
        if raw is None:
            (home / name).unlink(missing_ok=True)
        else:
            replace_file(home / name, raw)
    remote.mirrored.add(address)
    return home


def cut_off(name: str, raw: bytes) -> str:
    """What shows that a list was not sent to its end; a page that is no list at all is looked at later."""
    try:
        if name == MANIFEST and raw.lstrip().startswith(b"{"):
            json.loads(raw)
    except ValueError:
        return "it ends in the middle"
    return ""
