"""What a run measures, on which samples, and how results.json keeps it."""

import hashlib
import json
import platform
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipft import __version__
from clipft.config import Config, DataConfig, EvalConfig, EvaluateConfig
from clipft.data.index import Samples
from clipft.data.loader import WAIT
from clipft.data.order import Order
from clipft.data.split import Splits, load_splits
from clipft.data.waiting import Wait
from clipft.judge.evaluate import Evaluation, Task, build_task, embed, in_words, judge
from clipft.judge.table import print_results
from clipft.learn.memory import is_out_of_memory
from clipft.model.load import Clip
from clipft.plan import Steps
from clipft.ranks import Ranks
from clipft.report import RunFailed
from clipft.rundir import read_results, what_matters, write_results

PACKAGES = ("torch", "pytorch-lightning", "open_clip_torch", "timm", "webdataset")


@dataclass(frozen=True)
class Measure:
    """How features are made for a measurement, the same for every data set and every set of weights of a run."""

    clip: Clip
    ranks: Ranks
    trim: bool
    relevance: str
    batch_size: int
    workers: int
    max_pixels: int
    max_bad_frac: float
    wait: Wait

    def __call__(self, task: Task) -> Evaluation:
        """Retrieval metrics where samples have captions, zero-shot metrics where they have labels with names."""
        with naming_memory(f"{task.name} was measured", self.batch_size):
            embedded = embed(
                self.clip,
                task,
                batch_size=self.batch_size,
                device=self.ranks.device,
                workers=self.workers,
                max_pixels=self.max_pixels,
                trim=self.trim,
                autocast=self.ranks.autocast,
                wait=self.wait,
            )
            evaluation = judge(task, embedded, self.relevance)
        check_dropped(evaluation, self.max_bad_frac)
        return evaluation


@contextmanager
def naming_memory(what: str, batch_size: int) -> Iterator[None]:
    """Inside it memory that runs out is a RunFailed, with what was done and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            f"memory ran out while {what} with {batch_size} images or texts at a time. Use a smaller eval.batch_size "
            "(batch_size= of clipft evaluate); the result is the same."
        ) from error


def build_measure(
    config: EvalConfig | EvaluateConfig,
    data: DataConfig,
    clip: Clip,
    ranks: Ranks,
    trim: bool,
    workers: int,
    wait: Wait = WAIT,
) -> Measure:
    return Measure(
        clip,
        ranks,
        trim,
        relevance=config.relevance,
        batch_size=config.batch_size,
        workers=workers,
        max_pixels=data.max_pixels,
        max_bad_frac=data.max_bad_frac,
        wait=wait,
    )


def check_dropped(evaluation: Evaluation, max_bad_frac: float) -> None:
    """Raises where so many samples could not be used that the numbers are of another set."""
    indexed, used, dropped = (evaluation.gallery[name] for name in ("indexed", "used", "dropped"))
    if indexed - used > max_bad_frac * indexed:
        named = evaluation.gallery.get("examples", {})
        some = "; ".join(f"{reason}: {', '.join(keys)}" for reason, keys in named.items())
        raise ValueError(
            f"{evaluation.name}: {indexed - used:,} of {indexed:,} samples cannot be measured ({in_words(dropped)}), "
            f"more than data.max_bad_frac={max_bad_frac}.{f' Such as {some}.' if some else ''} Repair them (clipft "
            "data verify with out=FILE names all of them), or raise the limit."
        )


def validation(splits: Splits, measure: Measure, select: str) -> Callable[[], dict[str, float]]:
    """A function that measures the val split with the present weights; metrics without the data's name."""
    assert splits.val is not None
    task = build_task("val", splits.val, splits.classnames, splits.templates, measure.clip.tokenize, splits.text_errors)
    measurable = len(task.caption_of) if "recall" in select else task.label.ge(0).sum()
    if not measurable:
        lacks = "captions" if "recall" in select else "labels with class names"
        raise ValueError(f"eval.select={select!r} cannot be measured: the val split has no {lacks}.")

    def validate() -> dict[str, float]:
        return {name.removeprefix("val/"): value for name, value in measure(task).metrics.items()}

    return validate


def report_tasks(splits: Splits, others: list[DataConfig], clip: Clip) -> list[tuple[str, Task]]:
    """What the before/after table is made on, with the split: the run's data, and the others (plan.other_data)."""
    tasks: dict[str, tuple[str, Task]] = {}
    for each in [splits, *(load_splits(data) for data in others)]:
        split, samples = reported(each)
        if each.name not in tasks:
            task = build_task(each.name, samples, each.classnames, each.templates, clip.tokenize, each.text_errors)
            tasks[each.name] = split, task
        elif tasks[each.name][1].samples.fingerprint != samples.fingerprint:
            raise ValueError(
                f"Two data sets are called {each.name!r}. Give this run's another name with data.name=NAME."
            )
    return list(tasks.values())


def reported(splits: Splits, split: str | None = None) -> tuple[str, Samples]:
    """The split that tables are made on, with its name: test where there is one, else val, else train."""
    found = {"test": splits.test, "val": splits.val, "train": splits.train}
    for name in [split] if split else list(found):
        samples = found[name]
        if samples is not None:
            return name, samples
    raise ValueError(f"split={split!r}: {splits.name} has none. It has: {[k for k, v in found.items() if v]}.")


def record(
    folder: Path, ranks: Ranks, column: str, evaluations: list[tuple[str, Evaluation]], meta: dict[str, Any]
) -> None:
    """Adds a column to results.json."""
    if not ranks.first:
        return
    metrics = {name: value for _, evaluation in evaluations for name, value in evaluation.metrics.items()}
    gallery = {each.name: {"split": split, **each.gallery} for split, each in evaluations}
    write_results(folder, read_results(folder) | {column: metrics, "meta": meta | {"gallery": gallery}})


def describe_run(config: Config, splits: Splits, order: Order, steps: Steps, clip: Clip) -> dict[str, Any]:
    """What one has to know to read the numbers of results.json."""
    split, _ = reported(splits)
    return {
        "base_model": {"name": clip.name, "pretrained": clip.pretrained},
        "split": split,
        "relevance": config.eval.relevance,
        "selected_by": f"val {config.eval.select}",
        "seed": config.train.seed,
        "steps": steps.total,
        "config_sha256": hashlib.sha256(json.dumps(what_matters(config)).encode()).hexdigest(),
        "code_sha256": code_hash(),
        "samples": {name: len(part) for name in ("train", "val", "test") if (part := getattr(splits, name))},
        "units": steps.num_units,
        "fingerprint": fingerprints(splits, order),
        "versions": {
            "clipft": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def code_hash(*packages: str) -> str:
    """sha256 over clipft's own source files, or those of these packages of it."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(path for each in packages or (".",) for path in (root / each).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def fingerprints(splits: Splits, order: Order) -> dict[str, str]:
    """That of each split; what is trained on with the layout of its order, where it has one."""
    found = {name: part.fingerprint for name in ("train", "val", "test") if (part := getattr(splits, name))}
    if order.layout:
        found["train"] = hashlib.sha256(f"{found['train']} {order.layout}".encode()).hexdigest()
    return found


def facts(config: Config, meta: dict[str, Any], model: nn.Module) -> dict[str, str]:
    """What has to be the same on all ranks, by the name that an error gives it."""
    crc = 0
    for value in model.state_dict().values():
        crc = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    everything = {
        **what_matters(config),
        "clipft's code": meta["code_sha256"],
        **{f"the fingerprint of the {split} data": value for split, value in meta["fingerprint"].items()},
        "the number of units in an epoch": meta["units"],
        **{f"the version of {package}": value for package, value in meta["versions"].items()},
        "the checksum of the first weights": f"{crc:08x}",
    }
    return {key: str(value) for key, value in everything.items()}


def finish(folder: Path, reached: dict[str, Any]) -> dict[str, Any]:
    """Marks the run as finished, with what it has `reached`, and shows its table and what became of the samples.

    Returns the results.
    """
    found = read_results(folder)
    results = {column: found[column] for column in ("base", "best", "last") if column in found}
    results["meta"] = found["meta"] | {"finished": True} | reached
    write_results(folder, results)
    print_results(results, sys.stdout)
    print(ledger_line(reached["ledger"]))
    print(f"Results {folder}/results.json, weights {folder}/checkpoints/best.ckpt. Next: clipft export run={folder}")
    return results


def ledger_line(ledger: dict[str, Any]) -> str:
    """The ledger as one line for the terminal."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in ledger["dropped"].items())
    dropped = f"{sum(ledger['dropped'].values()):,} dropped{f' ({reasons})' if reasons else ''}"
    if "indexed" not in ledger:
        incomplete = ", ".join(f"{reason} {count}" for reason, count in ledger["incomplete"].items())
        beside = f"; incomplete in the shards: {incomplete}" if incomplete else ""
        return f"Samples: {ledger['drawn']:,} drawn = {ledger['used']:,} used + {dropped}{beside}"
    epochs = f"{ledger['epochs']} epoch{'s' if ledger['epochs'] > 1 else ''}"
    return (
        f"Samples: {ledger['indexed']:,} in {epochs} = {ledger['used']:,} used + "
        f"{dropped} + {ledger['left_out']:,} left out + {ledger['not_reached']:,} not reached"
    )


def check_same_data(config: Config, folder: Path, meta: dict[str, Any], done: int) -> None:
    """Raises when a run would go on with other samples than it began with."""
    before = read_results(folder).get("meta", {})
    if not done or not before or config.resume == "force":
        return
    changed = [split for split, value in meta["fingerprint"].items() if before["fingerprint"].get(split) != value]
    # The fingerprint sees members, not the captions in them.
    if not changed and before.get("units", meta["units"]) != meta["units"]:
        changed = ["train"]
    if changed:
        raise ValueError(
            f"{config.data.name}: the shards of {', '.join(changed)} are not those that {folder} began with. Put them "
            "back, or use resume=force to go on with these, resume=restart to begin again, or another name=."
        )
