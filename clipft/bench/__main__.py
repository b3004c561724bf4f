"""python -m clipft.bench data | step | loss | train | start | all: ratios to open_clip, made in one run."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes a line for each profile

from clipft.bench.report import Row, show, write

PHOTO_SIDES = [256, 512, 1024]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m clipft.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the JSON files (default bench)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parts = parser.add_subparsers(dest="benchmark", required=True)
    for name, (doc, add_options, _) in BENCHMARKS.items():
        add_options(parts.add_parser(name, help=doc, description=doc))
    options = parser.parse_args(arguments)
    options.device = options.device or default_device()
    for name in BENCHMARKS if options.benchmark == "all" else [options.benchmark]:
        doc, _, run = BENCHMARKS[name]
        rows = run(options)
        show(f"{name}: {doc}", rows)
        write(options.out, name, rows)
    if options.benchmark == "train":
        ratio = rows[-1]["ratio"]
        print(f"ratio median {ratio.median:.2f} min {ratio.min:.2f} max {ratio.max:.2f}")


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=int, nargs="+", default=PHOTO_SIDES, help="widths of the source photos")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)


def run_data(options: argparse.Namespace) -> list[Row]:
    from clipft.bench.loading import bench_data

    return bench_data(options.sides, options.samples, options.rounds)
