"""One full read of a data set: are these the bytes that were written, and what of them can be used?"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from clipft.config import DataConfig, VerifyConfig
from clipft.data.look import Looked, Rules, look_at
from clipft.data.manifest import MANIFEST, Listed, listed_beside, listed_shards
from clipft.data.names import SPLITS
from clipft.data.progress import Progress
from clipft.data.remote.addresses import shown
from clipft.data.sample import printable
from clipft.data.split import (
    CLASSNAMES,
    Found,
    check_files,
    counted,
    doubtful,
    find_shards,
    nothing_of,
    read_lines,
    stray,
    too_many_bad,
)
from clipft.data.workers import map_items, num_workers
from clipft.files import replace_file
from clipft.report import megabytes

UNLISTED = "unlisted"  # row of the table for tars beside shards.json that it does not name


@dataclass(frozen=True)
class Report:
    name: str
    place: str
    decode: bool
    splits: dict[str, list[Looked]]
    num_listed: int
    """Shards whose sha256 stands in a shards.json."""
    out: str | None
    """File with all findings."""


def verify(config: VerifyConfig) -> Report:
    """Reads every shard of the data set to its last byte, and writes what it found wrong to `out`."""
    if config.out is not None and (Path(config.out).is_dir() or not Path(config.out).absolute().parent.is_dir()):
        raise ValueError(
            f"out={config.out!r} must be a file in a folder that is there, for a line of JSON per finding."
        )
    name, folder, splits = shards_of(config.data)
    num_classes = len(read_lines(folder / CLASSNAMES) or [])
    rules = Rules(config.decode, config.data.max_pixels, config.data.text_errors, num_classes)
    listed = listed_beside([path for paths in splits.values() for path in paths])
    found = look_at_all(list(dict.fromkeys(p for paths in splits.values() for p in paths)), rules, config.data.workers)
    looked = {path: compared(each, listed.get(path)) for path, each in found.items()}
    if config.out is not None:
        replace_file(Path(config.out), "".join(json.dumps(row) + "\n" for row in findings(looked.values())))
    return Report(
        name=name,
        place=str(folder),
        decode=config.decode,
        splits={split: [looked[path] for path in paths] for split, paths in splits.items()},
        num_listed=len(listed),
        out=config.out,
    )


def findings(shards: Iterable[Looked]) -> Iterator[dict[str, str | int | None]]:
    """What is wrong with a shard (without key), and every sample that cannot be used with the byte of its header."""
    for each in shards:
        for what in each.problems + each.doubts:
            yield {"shard": each.path, "byte": None, "key": None, "reason": what}
        for lost in each.lost:
            yield {"shard": each.path, "byte": lost.byte, "key": lost.key, "reason": lost.reason}


def shards_of(config: DataConfig) -> tuple[str, Path, dict[str, list[str]]]:
    """Name, folder and shards by split; of a packed folder all that shards.json lists, there or not, and all others."""
    folder = Path(config.path).expanduser() if config.path else None
    listed = listed_shards(folder) if folder is not None and (folder / MANIFEST).is_file() else {}
    if folder is None or not any(listed.values()):
        found = find_local(config)
        return found.name, found.folder, {split: paths for split, paths in found.shards.items() if paths}
    shards = {split: [str(each.path) for each in entries] for split, entries in listed.items()}
    known = {path for paths in shards.values() for path in paths}
    others = sorted({str(path) for path in folder.glob("*.tar")} - known)
    check_files("data.path", others)
    given = find_local(replace(config, path=None)).shards if config.train or config.val or config.test else {}
    shards |= ({UNLISTED: others} if others else {}) | {split: paths for split, paths in given.items() if paths}
    return config.name or folder.resolve().name, folder, shards


def find_local(config: DataConfig) -> Found:
    """The shards of the config; raises for those elsewhere, of which every download is compared anyway."""
    found = find_shards(config)
    away = next(iter(found.remote.shards.values()), None)
    if away is not None:
        raise ValueError(
            f"data verify and data check read local shards, and {shown(away.address)} lies elsewhere. Each "
            "download is compared with shards.json, or with its index; clipft data index asks whether it was changed. "
            "To have its images looked at too, download the set and give its folder."
        )
    return found


def compared(looked: Looked, listed: Listed | None) -> Looked:
    """The shard with what differs from shards.json among its problems; without doubts where nothing does."""
    if listed is None or looked.sha256 is None:
        return looked
    if looked.sha256 == listed.sha256:
        return replace(looked, doubts=[])
    size = f": it has {looked.num_bytes} bytes, {listed.bytes} were written" if looked.num_bytes != listed.bytes else ""
    return replace(looked, problems=[f"its sha256 is not the one in {MANIFEST}{size}", *looked.problems])


def look_at_all(paths: list[str], rules: Rules, workers: int | None) -> dict[str, Looked]:
    """What each shard holds, read by several processes (0: by this one), with progress on stderr."""
    workers = num_workers(workers)
    progress = Progress("reading", "shards", len(paths))
    found = map_items(partial(look_at, rules=rules), paths, workers, progress, "data.workers")
    return dict(zip(paths, found, strict=True))


def describe(report: Report) -> str:
    """What was read and compared, a table with a line per split, what was left out, and whether all is sound."""
    everything = all_shards(report)
    size = f"{counted(len(everything), 'shard')}, {megabytes(sum(each.num_bytes for each in everything))}"
    lines = [printable(f"{report.name} ({report.place}): {size}"), said_of_checksums(report)]
    if not report.decode:
        lines.append("Images and captions were not looked at (decode=false).")
    splits = {**report.splits, **({"total": everything} if len(report.splits) > 1 else {})}
    columns = ("shards", "indexed", "fine", "dropped", *(("captioned", "labelled") if report.decode else ()))
    lines.append(table_row("split", columns))
    for split, shards in splits.items():
        sums = summed(shards)
        lines.append(table_row(split, [f"{sums[column]:,}" for column in columns]))
    for split, shards in report.splits.items():
        lines += losses(split, shards)
    if any(each.problems or each.lost for each in everything):
        where = f"stands in {report.out}" if report.out else "can be written to a file: out=FILE"
        lines.append(f"Each of these samples, with reason, shard and byte, {where}")
    if not any(each.problems for each in everything):
        lines.append("No damage found." if report.num_listed < len(everything) else "All of it is as it was written.")
    return "\n".join(lines)


def said_of_checksums(report: Report) -> str:
    num_shards = len(all_shards(report))
    if report.num_listed == num_shards:
        return f"The sha256 of every shard was compared with {MANIFEST}."
    if report.num_listed:
        return f"The sha256 of {report.num_listed} shards was compared with {MANIFEST}; it does not list the others."
    what = "headers, images and captions" if report.decode else "headers"
    return f"There is no {MANIFEST}, so no checksum to compare: {what} were checked, and other changes go unseen."


def all_shards(report: Report) -> list[Looked]:
    """Each shard once, also one that belongs to two splits."""
    return list({each.path: each for shards in report.splits.values() for each in shards}.values())


def summed(shards: list[Looked]) -> dict[str, int]:
    """The sums of the table's columns."""
    sums = {name: sum(getattr(each, name) for each in shards) for name in ("indexed", "fine", "captioned", "labelled")}
    return {"shards": len(shards), **sums, "dropped": sum(sum(each.dropped.values()) for each in shards)}


def losses(split: str, shards: list[Looked]) -> list[str]:
    """A line for each reason for which samples were dropped or members ignored, and for shards without any sample."""
    dropped, ignored = Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    for each in shards:
        dropped.update(each.dropped)
        ignored.update(each.ignored)
        for lost in each.lost:
            examples.setdefault(lost.reason, printable(f"{lost.key} (byte {lost.byte} of {each.path})"))
    lines = [f"{split}: {count:,} dropped, {reason}, such as {examples[reason]}" for reason, count in dropped.items()]
    lines += [f"{split}: {what}" for what in stray(ignored)]
    lines += doubtful(split, [doubt for each in shards for doubt in each.doubts], len(shards))
    empty = [each.path for each in shards if not each.indexed and not each.problems]
    return lines + (
        [f"{split}: {counted(len(empty), 'shard')} without any sample, such as {printable(empty[0])}"] if empty else []
    )


def refuse(report: Report, max_bad_frac: float) -> None:
    """Raises when a shard is not what was written, or when training would stop over what cannot be used."""
    everything = all_shards(report)
    damaged = [printable(f"{each.path}: {'; '.join(each.problems)}") for each in everything if each.problems]
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {counted(len(everything), 'shard')} cannot be trusted:\n"
            + "\n".join(damaged)
            + "\nCopy them again from where they are whole, or pack the set again (clipft data pack)."
        )
    trouble = []
    for split in [split for split in report.splits if split in SPLITS] or report.splits:  # nobody reads the others
        sums = summed(report.splits[split])
        sentence = too_many_bad(split, sums["dropped"], sums["indexed"], max_bad_frac)
        if sentence is not None or not sums["fine"]:
            trouble.append(sentence or nothing_of(split, sums["indexed"]))
    if trouble:
        raise ValueError("\n".join(trouble + ([] if report.out else ["out=FILE names all of them."])))


def table_row(split: str, cells: Iterable[str]) -> str:
    return f"{split:<10} " + " ".join(f"{cell:>10}" for cell in cells)
