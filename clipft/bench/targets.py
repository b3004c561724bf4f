"""bench gpu: the benchmarks at sizes that fill a GPU, one after the other, and what came of each target."""

import os
from collections.abc import Mapping, Sequence

from clipft.bench.report import Row, Spread

STEP = ("--steps", "20", "--rounds", "2", "--overhead-steps", "100", "--compile")
RUNS = {
    "data": ("data", "--sides", "512", "--rounds", "2"),
    "step-ViT-B-32": ("step", "--model", "ViT-B-32", "--batch-size", "1024", *STEP),
    "step-ViT-B-16": ("step", "--model", "ViT-B-16", "--batch-size", "512", *STEP),
    "step-ViT-L-14": ("step", "--model", "ViT-L-14", "--batch-size", "128", *STEP),
    "loss": ("loss", "--worlds", "8", "--max-s", "5"),
    "train": (
        "train",
        "--batch-size",
        "256",
        "--warm-up",
        "20",
        "--steps",
        "60",
        "--rounds",
        "1",
        "--precision",
        "bf16",
    ),
}
"""Name of the JSON file -> arguments."""


def gpu_arguments(cores: int) -> dict[str, list[str]]:
    """The arguments of each run; whole runs with as many loader processes as a run would have."""
    arguments = {name: list(each) for name, each in RUNS.items()}
    arguments["train"] += ["--workers", str(max(1, cores - 1))]
    return arguments


def targets(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """A row for each target with what was found; nothing is found where a run was left out or has no such figure."""
    cores = len(os.sched_getaffinity(0)) - 1
    loaded = figure(found["data"], "shards to batches", "ours /s/core")
    trained = figure(found["step-ViT-B-32"], "ours, compiled", "samples/s")
    fastest = [figure(found[f"step-{model}"], "ours, compiled", "MFU") for model in ("ViT-B-16", "ViT-L-14")]
    known = [mfu for mfu in fastest if mfu is not None]
    whole = found["train"][-1]["ratio"] if found["train"] else None
    fed = loaded * cores / trained if loaded and trained else None
    return [
        {"target": "ViT-B-32, whole runs over open_clip_train's", "at least": 1.5, "found": median(whole)},
        {"target": "MFU of ViT-B-16 or ViT-L-14", "at least": 0.4, "found": max(known, default=None)},
        {"target": f"what {cores} cores load over what ViT-B-32 trains", "at least": 1.0, "found": fed},
    ]


def figure(rows: Sequence[Row], what: str, key: str) -> float | None:
    return next((row.get(key) for row in rows if row["what"].startswith(what)), None)


def median(value: Spread | None) -> float | None:
    return None if value is None else value.median
