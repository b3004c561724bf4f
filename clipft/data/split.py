"""A data config to its train, val and test samples. Nothing here imports torch."""

import difflib
import glob
import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from jaxtyping import Bool

from clipft.config import DataConfig
from clipft.data.index import Samples, index_shards
from clipft.data.manifest import AGAIN, CLASSNAMES, MANIFEST, TEMPLATES, listed_beside, listed_shards
from clipft.data.names import SPLIT_OF, SPLITS, natural, sorted_by_split
from clipft.data.remote.addresses import PIPE, is_remote, name_of, shown
from clipft.data.remote.cache import Remote
from clipft.data.remote.indexes import learn
from clipft.data.remote.listing import expand_remote, home_of_remote, is_folder, mirror, read_remote, remote_of
from clipft.data.sample import printable
from clipft.report import megabytes

VAL_FRAC = 0.05
NORMAL = ("folder", "meta")  # members without a sample that need no mention
HOW = (
    "Put shards there (tars such as train-000.tar with key.jpg and key.txt or key.json), or make them from "
    "images with captions or labels: clipft data pack source=FOLDER out={out}"
)


@dataclass(frozen=True)
class Found:
    """The shards of a data config by split; existing files, nothing of them read yet."""

    name: str
    folder: Path
    """Where classnames.txt and the prompt templates would lie."""
    shards: dict[str, list[str]]
    notes: list[str]
    mix: list[tuple[int, float]]
    """Shards and weight of each source, where data.train has sources with weights."""
    remote: Remote
    """The shards that lie elsewhere; their paths are places in the cache, where they need not be yet."""


@dataclass(frozen=True)
class Splits:
    name: str
    train: Samples | None
    val: Samples | None
    test: Samples | None
    notes: list[str]
    """What was held out, dropped or not used, in sentences for the plan."""
    classnames: list[str] | None
    templates: list[str]
    text_errors: str
    """data.text_errors, by which captions are read."""
    mix: list[tuple[int, float]] = field(default_factory=list)
    """Shards and weight of each source of train, where it has sources with weights."""
    held_out: bool = False
    """Whether val is a share of the samples of train's shards."""


def nearest(path: Path) -> str:
    """A sentence with the existing names closest to one that was looked for; in a folder, to any tar."""
    path = path / "*.tar" if path.is_dir() else path
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(os.listdir(parent))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:3]
    return printable(f"{parent}/ holds: {', '.join(sorted(close))}." if close else f"{parent}/ is empty.")


def expand_shards(key: str, patterns: list[str], remote: Remote | None = None) -> list[str]:
    """The existing shards that directories, globs, braces and file names stand for, in their order.

    Those at addresses are noted in `remote`, and stand in the result as places in its cache.
    """
    shards = [
        shard
        for pattern in patterns
        for shard in (
            expand_remote(key, pattern, remote) if remote and is_remote(pattern) else expand_pattern(key, pattern)
        )
    ]
    first: dict[str, str] = {}
    for shard in shards:
        before = first.setdefault(os.path.realpath(shard), shard)
        if before is not shard:
            also = "" if before == shard else f" (also as {printable(shard)})"
            raise ValueError(
                f"{key}={patterns!r} names {printable(before)} more than once{also}. Name each shard once."
            )
    return shards


def expand_pattern(key: str, pattern: str) -> list[str]:
    if is_remote(pattern):
        raise ValueError(f"{key}={shown(pattern)} must be local files. Download them and give their folder.")
    path = Path(pattern).expanduser()
    if path.is_dir():
        refuse_layout(key, path)
        shards = sorted((str(shard) for shard in path.glob("*.tar")), key=natural)
    elif path.is_file():
        shards = [str(path)]
    else:
        shards = expand_braces(key, pattern, str(path))
    if not shards:
        raise ValueError(
            f"{key}={pattern!r} matches no shard. Expected a folder with .tar files, a glob, quoted braces "
            f'such as "x-{{000..009}}.tar", or a file. {nearest(path)}'
        )
    check_files(key, shards)
    return shards


def check_files(key: str, shards: Iterable[str]) -> None:
    """Raises for a name that is no file, such as a folder or a pipe, of which a read would never return."""
    odd = next((shard for shard in shards if not os.path.isfile(shard)), None)
    if odd is not None:
        what = "a folder" if os.path.isdir(odd) else "no plain file" if os.path.exists(odd) else "a link to nothing"
        raise ValueError(f"{key}: {printable(odd)} is {what}, and no shard. Remove it, or name it otherwise.")


def refuse_layout(key: str, folder: Path) -> None:
    """Raise for a folder with several splits: all its tars together would mix test into training."""
    splits = [split for split, shards in read_folder(folder)[0].items() if shards]
    if len(splits) > 1:
        raise ValueError(
            f"{key}={str(folder)!r} is a folder with splits of its own ({', '.join(splits)}). Write "
            f"data={folder} to use them, or name the shards of one split: {key}='{folder}/train-*.tar'."
        )


def expand_braces(key: str, pattern: str, path: str) -> list[str]:
    """Files behind the braces and globs of a pattern; a name that the braces ask for must exist."""
    try:
        names = list(braceexpand(path))
    except ValueError as error:
        raise ValueError(f"{key}={pattern!r}: unbalanced braces. Write them as {{000..009}} or {{a,b}}.") from error
    found = [sorted(glob.glob(name), key=natural) if glob.has_magic(name) else [name] for name in names]
    shards = [shard for group in found for shard in group]
    missing = [shard for shard in shards if not os.path.lexists(shard)]
    if missing and len(missing) < len(shards):
        raise ValueError(
            f"{key}={pattern!r}: {len(missing)} of {len(shards)} shards do not exist, the first is "
            f"{printable(missing[0])}. {nearest(Path(missing[0]))}"
        )
    return [] if missing else shards


def by_prefix(folder: Path) -> dict[str, list[str]]:
    """Shards by split from names (train-000.tar) and subfolders (train/000.tar)."""
    found = [*folder.glob("*.tar"), *(path for path in folder.glob("*/*.tar") if path.parent.suffix != ".tar")]
    names = [path.relative_to(folder).as_posix() for path in found]
    return {split: [str(folder / name) for name in part] for split, part in sorted_by_split(names).items()}


def read_folder(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Shards by split of a packed folder, and what of it is not used.

    shards.json decides where there is one; then names; a folder of plain tars is training data.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    shards = by_prefix(folder)
    plain = sorted((str(path) for path in folder.glob("*.tar")), key=natural)
    if not any(shards.values()):
        return {**shards, "train": plain}, []
    unused = [path for path in plain if not any(path in names for names in shards.values())]
    note = printable(f"{folder}: {len(unused)} tars belong to no split: {(unused or [''])[0]}, ...")
    return shards, [note] if unused else []


def read_manifest(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Shards by split as shards.json lists them; files that are missing or of another size raise."""
    path = folder / MANIFEST
    listed = listed_shards(folder)
    for shard in (shard for shards in listed.values() for shard in shards):
        found = os.path.getsize(shard.path) if shard.path.is_file() else None
        if found != shard.bytes:
            state = "does not exist" if found is None else f"has {found} bytes"
            raise ValueError(f"{shard.path} {state}; {path} lists it with {shard.bytes} bytes. {AGAIN}")
    others = [split for split in listed if split not in SPLITS]
    notes = [f"{path}: split {split!r} is none of {', '.join(SPLITS)} and is not used" for split in others]
    return {split: [str(shard.path) for shard in listed.get(split, [])] for split in SPLITS}, notes


def find_shards(config: DataConfig) -> Found:
    """Which shards the config means; cheap, so that a command can fail before anything heavy is imported."""
    weighted = [source for source in config.train if isinstance(source, dict)]
    patterns = [pattern for source in weighted for pattern in source["shards"]] or config.train
    given = {"train": patterns, "val": config.val, "test": config.test}
    if config.path is None and not any(given.values()):
        raise ValueError("There is no data. Give data=NAME (the folder data/NAME), a path, or data.train=SHARDS.")
    shards: dict[str, list[str]] = {split: [] for split in SPLITS}
    notes: list[str] = []
    folder, name, remote = None, config.name, remote_of(config)
    if config.path is not None and is_remote(config.path):
        shards, notes, folder = read_address(config.path, remote)
        name = name or name_of(config.path.rstrip("/"))
    elif config.path is not None:
        folder = Path(config.path).expanduser()
        shards, notes = read_path(config.path, folder)
        folder = folder if folder.is_dir() else folder.parent
    for split, patterns in given.items():
        if patterns:
            shards[split] = expand_shards(f"data.{split}", patterns, remote)
    if folder is None:
        first = next(paths[0] for paths in shards.values() if paths)
        folder, place = home_of(first, remote)
        name = name or place
    measured = set(map(os.path.realpath, shards["val"] + shards["test"]))
    shared = [shard for shard in shards["train"] if os.path.realpath(shard) in measured]
    if shared:
        notes.append(f"{len(shared)} shards are both trained on and measured on: {printable(min(shared))}, ...")
    mix = [(len(expand_shards("data.train", source["shards"], remote)), source["weight"]) for source in weighted]
    return Found(name or folder.resolve().name, folder, shards, notes, mix, remote)


def read_address(address: str, remote: Remote) -> tuple[dict[str, list[str]], list[str], Path]:
    """Shards by split of a data.path that is an address; notes; a local folder with its class names and templates."""
    if not is_folder(address):
        paths = expand_remote("data.path", address, remote)
        return {"train": paths, "val": [], "test": []}, [], home_of(paths[0], remote)[0]
    shards, notes = read_remote("data.path", address, remote)
    return shards, notes, mirror(address.rstrip("/") + "/", remote)


def read_path(value: str, path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Shards by split of what data.path names; nothing there raises with what to do."""
    if path.is_file() or "{" in value or glob.has_magic(value):
        return {"train": expand_pattern("data.path", value), "val": [], "test": []}, []
    if not path.is_dir():
        raise ValueError(f"data.path={value!r} does not exist. {HOW.format(out=path)}\n{nearest(path)}")
    shards, notes = read_folder(path)
    if any(shards.values()):
        check_files("data.path", (shard for paths in shards.values() for shard in paths))
        return shards, notes
    if (path / "metadata.jsonl").is_file():
        command = f"clipft data pack source={path} out={path}-shards"
        raise ValueError(f"data.path={value!r} holds images, no shards yet. Pack them: {command}")
    raise ValueError(f"data.path={value!r} holds no shards. {HOW.format(out=path)}")


def home_of(shard: str, remote: Remote | None = None) -> tuple[Path, str]:
    """The folder of the data set that a shard belongs to, its own or the one above train/, and the set's name.

    Of a shard elsewhere it is a local one, with the set's class names and templates.
    """
    if remote is not None and shard in remote.shards:
        address = remote.shards[shard].address
        if address.startswith(PIPE) or "?" in address:
            return Path(shard).parent, "remote"
        return mirror(home_of_remote(address), remote), name_of(home_of_remote(address).rstrip("/")) or "remote"
    folder = Path(shard).resolve().parent
    folder = folder.parent if folder.name.lower() in SPLIT_OF else folder
    return folder, folder.name


def load_splits(config: DataConfig) -> Splits:
    """The samples of each split; without val a fixed share of train is held out."""
    found = find_shards(config)
    learn(found.remote, config.workers)
    samples = {split: counted_samples(paths, found.remote) if paths else None for split, paths in found.shards.items()}
    notes = found.notes + [note for split, part in samples.items() if part is not None for note in losses(split, part)]
    notes += elsewhere(found.remote)
    for split, part in samples.items():
        check_dropped(f"data.{split}", part, config.max_bad_frac)
    measured = [part.remote for part in (samples["val"], samples["test"]) if part and part.remote]
    kept = [shard for remote in measured for shard in remote.shards.values()]
    train, val = samples["train"], samples["val"]
    if train is not None and train.remote is not None:
        train = replace(train, remote=replace(train.remote, kept=kept))
    held_out = train is not None and val is None
    if val is not None and config.val_frac is not None:
        raise ValueError(
            f"data.val_frac={config.val_frac} would be ignored: {found.name} has a val split. Leave it out."
        )
    if train is not None and val is None:
        val_frac = VAL_FRAC if config.val_frac is None else config.val_frac
        train, val = hold_out(train, val_frac)
        notes.append(
            f"no val given: {len(val)} of {len(train) + len(val)} training samples held out by a hash of "
            f"their keys (data.val_frac={val_frac}), {len(train)} left to train on"
        )
    templates = read_lines(found.folder / TEMPLATES) or []
    classnames = read_lines(found.folder / CLASSNAMES)
    test, errors, mix = samples["test"], config.text_errors, found.mix
    return Splits(found.name, train, val, test, notes, classnames, templates, errors, mix, held_out)


def elsewhere(remote: Remote) -> list[str]:
    """A sentence about the shards that lie elsewhere, where there are any."""
    if not remote.shards:
        return []
    size = sum(shard.index.size for shard in remote.shards.values() if shard.index)
    where = printable(f"{remote.cache.folder}, at most {megabytes(remote.cache.limit)} (data.cache_size)")
    return [f"{counted(len(remote.shards), 'shard')} of {megabytes(size)} lie elsewhere and come by way of {where}"]


def counted_samples(paths: list[str], remote: Remote) -> Samples:
    """The samples of the shards; raises where shards.json lists another number of them."""
    away = {path: remote.shards[path] for path in paths if path in remote.shards}
    samples = index_shards(paths, replace(remote, shards=away) if away else None)
    listed = {path: shard.samples for path, shard in away.items() if shard.samples is not None}
    with suppress(ValueError):  # another program's file of this name, beside shards that were named one by one
        listed |= {path: each.samples for path, each in listed_beside(set(paths) - set(away)).items()}
    counts = np.bincount(samples.rows[:, 0], minlength=len(paths)).tolist()
    for path, count in zip(paths, counts, strict=True):
        if path in listed and count != listed[path]:
            where = shown(away[path].address) if path in away else printable(path)
            raise ValueError(
                f"{where} holds {counted(count, 'usable sample')}; {MANIFEST} lists it with {listed[path]}. {AGAIN}"
            )
    return replace(samples, doubts={path: what for path, what in samples.doubts.items() if path not in listed})


def check_dropped(key: str, samples: Samples | None, max_bad_frac: float) -> None:
    """Raises where the index of the shards leaves out more than this share of their samples."""
    num_dropped = sum(samples.dropped.values()) if samples else 0
    if samples and num_dropped > max_bad_frac * (num_dropped + len(samples)):
        raise ValueError(
            f"{key}: {num_dropped:,} of {num_dropped + len(samples):,} samples cannot be used ({samples.lost()}), "
            f"more than data.max_bad_frac={max_bad_frac}. Repair the shards, or raise the limit."
        )


def too_many_bad(split: str, bad: int, total: int, max_bad_frac: float) -> str | None:
    """Why training would stop over the samples of a split that cannot be used; None where it would not."""
    if bad <= max_bad_frac * total:
        return None
    return (
        f"{split}: {bad:,} of {total:,} samples cannot be used, more than data.max_bad_frac={max_bad_frac}: "
        "training would stop. Repair the data, or raise the limit."
    )


def nothing_of(split: str, indexed: int) -> str:
    """What to say of a split without a sample that can be used."""
    return f"{split}: none of {counted(indexed, 'sample')} can be used."


def losses(split: str, samples: Samples) -> list[str]:
    """What the indexes of a split's shards leave out, in sentences."""
    notes = [
        f"{split}: {counted(count, 'sample')} left out ({reason}, such as {samples.examples[reason]})"
        for reason, count in samples.dropped.items()
    ]
    notes += [f"{split}: {what}" for what in stray(samples.ignored)]
    notes += doubtful(split, samples.doubts.values(), len(samples.shards))
    filled = np.bincount(samples.rows[:, 0], minlength=len(samples.shards)) > 0
    if not filled.all():
        first = printable(samples.shards[int(np.argmin(filled))])
        notes.append(
            f"{split}: {np.sum(~filled)} of {counted(len(filled), 'shard')} without any sample, such as {first}"
        )
    return notes


def stray(ignored: Mapping[str, int]) -> list[str]:
    """What to say of members that belong to no sample, counted by reason."""
    return [
        f"{counted(count, 'member')} without a sample ({reason})"
        for reason, count in ignored.items()
        if reason not in NORMAL
    ]


def doubtful(split: str, doubts: Iterable[str], num_shards: int) -> list[str]:
    """A sentence about the shards that may have lost their last samples, where there are any."""
    doubts = list(doubts)
    return [f"{split}: {len(doubts)} of {counted(num_shards, 'shard')} may be cut: {doubts[0]}"] if doubts else []


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def hold_out(train: Samples, val_frac: float) -> tuple[Samples, Samples]:
    """Training samples without the share that is lowest by a hash of its keys, and that share."""
    chosen = held_out([train.key(i) for i in range(len(train))], val_frac)
    rest = train.take(np.flatnonzero(~chosen))
    return replace(rest, dropped=train.dropped, examples=train.examples), train.take(np.flatnonzero(chosen))


def held_out(keys: list[str], val_frac: float) -> Bool[np.ndarray, " keys"]:
    """Which of the training samples are held out.

    The hash sees the key alone, so neither the order of the shards nor the rest of the data decides.
    """
    num_val = max(1, round(val_frac * len(keys)))
    if num_val >= len(keys):
        raise ValueError(
            f"data.val_frac={val_frac} of {len(keys)} samples leaves none to train on. "
            "Make it smaller, or give data.val."
        )
    chosen = np.zeros(len(keys), bool)
    chosen[np.argsort(column_of_hashes(keys), kind="stable")[:num_val]] = True
    return chosen


def column_of_hashes(keys: Iterable[str]) -> np.ndarray:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)


def read_lines(path: Path) -> list[str] | None:
    """The lines of a text file (class number = line number); None when there is no such file."""
    if not path.is_file():
        return None
    lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
