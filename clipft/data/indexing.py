"""Finds out what the shards of a data set hold, once and before a run needs to know."""

from dataclasses import dataclass

from clipft.config import DataConfig
from clipft.data.index import Samples, load_index, samples_of
from clipft.data.progress import Progress
from clipft.data.remote.cache import Remote
from clipft.data.remote.indexes import learn
from clipft.data.split import counted, find_shards, losses
from clipft.data.workers import map_items, num_workers


@dataclass(frozen=True)
class Indexed:
    name: str
    splits: dict[str, Samples]
    num_shards: int
    num_read: int
    """Shards elsewhere that were read whole for it, as nothing said what they hold."""
    remote: Remote


def index(config: DataConfig) -> Indexed:
    """Indexes every shard whose index is missing or of another file; a kill loses no finished one."""
    found = find_shards(config)
    paths = list(dict.fromkeys(path for part in found.shards.values() for path in part))
    local = [path for path in paths if path not in found.remote.shards]
    workers = num_workers(config.workers)
    loaded = map_items(load_index, local, workers, Progress("indexing", "shards", len(local)), "data.workers")
    read = learn(found.remote, config.workers, again=True)
    indexes = dict(zip(local, loaded, strict=True))
    indexes |= {path: shard.index for path, shard in found.remote.shards.items() if shard.index is not None}
    parts = {split: part for split, part in found.shards.items() if part}
    splits = {split: samples_of(part, [indexes[path] for path in part], found.remote) for split, part in parts.items()}
    return Indexed(found.name, splits, len(paths), len(read), found.remote)


def describe(indexed: Indexed) -> str:
    """What there is in each split, and what was left out."""
    lines = [f"{indexed.name}: {counted(indexed.num_shards, 'shard')} indexed, {indexed.num_read} read whole for it"]
    lines.append(f"{'split':<8}{'shards':>8}{'samples':>12}{'dropped':>10}{'MB':>12}")
    for split, samples in indexed.splits.items():
        dropped, size = sum(samples.dropped.values()), samples.stamps[:, 0].sum() / 1e6
        lines.append(f"{split:<8}{len(samples.shards):>8,}{len(samples):>12,}{dropped:>10,}{size:>12,.1f}")
    return "\n".join(lines + [note for split, samples in indexed.splits.items() for note in losses(split, samples)])
