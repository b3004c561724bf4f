"""python -m clipft.bench data | step | loss | train | start | scale | predict | all | gpu"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes lines about each profile
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in a run

from clipft.bench.report import Row, show, write

SUBJECT = "Speed and memory beside open_clip, both measured in one run."
Options = argparse.Namespace


@dataclass(frozen=True)
class Benchmark:
    doc: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], list[Row]]


def main(arguments: list[str]) -> list[Row]:
    options = build_parser().parse_args(arguments)
    if options.benchmark == "all":
        shared = arguments[: arguments.index("all")]
        return [row for name in BENCHMARKS for row in main([*shared, name])]
    if options.benchmark == "gpu":
        return run_gpu(options, arguments[: arguments.index("gpu")])
    benchmark = BENCHMARKS[options.benchmark]
    options.device = options.device or default_device()
    rows = benchmark.run(options)
    if not rows:
        return rows
    show(f"{options.benchmark}: {benchmark.doc}", rows)
    write(options.out, options.name or options.benchmark, rows)
    if options.benchmark == "train":
        ratio = rows[-1]["ratio"]
        print(f"ratio median {ratio.median:.2f} min {ratio.min:.2f} max {ratio.max:.2f}")
    return rows


def run_gpu(options: Options, shared: list[str]) -> list[Row]:
    from clipft.bench.targets import gpu_arguments, targets

    if default_device() != "cuda":
        build_parser().error("gpu: torch sees no CUDA device")
    found = {}
    for name, each in gpu_arguments(len(os.sched_getaffinity(0))).items():
        found[name] = main([*shared, "--name", name, *each])
    rows = targets(found)
    show("gpu: targets on one H100", rows)
    write(options.out, "gpu", rows)
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clipft.bench", description=SUBJECT)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the JSON files (default bench)")
    parser.add_argument("--name", help="of the JSON file (default: that of the benchmark)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--open-clip-python", help="Python that has open_clip_torch[training] and webdataset==0.2.86")
    parts = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        benchmark.add_options(parts.add_parser(name, help=benchmark.doc, description=benchmark.doc))
    parts.add_parser("all", help="each of them with its defaults")
    parts.add_parser("gpu", help="those that fill a GPU, at its sizes, and what came of the targets")
    return parser


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def count(text: str) -> int:
    """Of what there must be one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 or more")
    return int(text)


def data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=count, nargs="+", default=[256, 512, 1024], help="widths of the source photos")
    parser.add_argument("--samples", type=count, default=96)
    parser.add_argument("--rounds", type=count, default=5)


def run_data(options: Options) -> list[Row]:
    from clipft.bench.loading import bench_data

    return bench_data(options.sides, options.samples, options.rounds)


def loss_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=count, nargs="+", default=[1 << k for k in range(10, 17)])
    parser.add_argument("--worlds", type=count, nargs="+", default=[1, 8, 64], help="numbers of ranks")
    parser.add_argument("--width", type=count, default=768, help="of the features")
    parser.add_argument("--max-s", type=float, default=60.0, help="what would take longer is computed")


def run_loss(options: Options) -> list[Row]:
    import torch

    from clipft.bench.losses import bench_loss

    return bench_loss(options.batches, options.worlds, options.width, torch.device(options.device), options.max_s)


def train_options(parser: argparse.ArgumentParser) -> None:
    run_options(parser, model="ViT-B-32", batch=32, rounds=3)
    parser.add_argument("--warm-up", type=count, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=count, default=5, help="steps that are timed")


def run_options(parser: argparse.ArgumentParser, model: str, batch: int, rounds: int) -> None:
    parser.add_argument("--model", default=model, help="architecture")
    parser.add_argument("--batch-size", type=count, default=batch)
    parser.add_argument("--rounds", type=count, default=rounds)
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--data", help="packed set whose images and first captions are used; drawn ones without")
    parser.add_argument("--side", type=count, default=512, help="width of the drawn photos")


def run_train(options: Options) -> list[Row]:
    from clipft.bench.training import bench_train

    if options.open_clip_python is None:
        print("train: left out, for want of --open-clip-python")
        return []
    with tempfile.TemporaryDirectory(prefix="clipft-bench-") as folder:
        task = prepared(options, Path(folder), options.warm_up + options.steps)
        return bench_train(task, options.open_clip_python, options.rounds, options.warm_up)


def prepared(options: Options, folder: Path, steps: int):
    """The task; raises unless both trainers agree on the first loss."""
    from clipft.bench.training import check_equal, prepare

    task = prepare(
        folder,
        architecture=options.model,
        data=options.data,
        side=options.side,
        batch_size=options.batch_size,
        steps=steps,
        workers=options.workers,
        device=options.device,
        precision=options.precision,
    )
    if options.open_clip_python:
        ours, theirs = check_equal(task, options.open_clip_python)
        print(
            f"first losses on one batch from the same weights: {ours} (clipft), {theirs} (open_clip_train)", flush=True
        )
    return task


def step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-32", help="architecture")
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="default: bf16-mixed on cuda")
    parser.add_argument("--compile", action="store_true", help="also ours with train.compile")
    parser.add_argument(
        "--overhead-steps", type=count, default=500, help="of the tiny model, to tell what a step costs"
    )


def run_step(options: Options) -> list[Row]:
    import torch

    from clipft.bench.overhead import overhead
    from clipft.bench.stepping import bench_step, place
    from clipft.model.compiled import check_compile
    from clipft.run import quiet_libraries

    quiet_libraries()
    device = torch.device(options.device)
    precision = options.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")
    resident = place(options.model, options.batch_size, device, precision)
    if options.compile:
        check_compile(resident.clip, device)
    rows = bench_step(resident, options.steps, options.rounds, options.compile)
    return [*rows, *overhead(place("tiny", 8, device, "32-true"), options.overhead_steps, options.rounds)]


def start_options(parser: argparse.ArgumentParser) -> None:
    run_options(parser, model="tiny", batch=8, rounds=3)


def run_start(options: Options) -> list[Row]:
    from clipft.bench.startup import bench_start

    with tempfile.TemporaryDirectory(prefix="clipft-bench-") as folder:
        return bench_start(prepared(options, Path(folder), steps=1), options.open_clip_python, options.rounds)


def scale_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worlds", type=count, nargs="+", default=[1, 2, 4], help="numbers of ranks, on this CPU")
    parser.add_argument("--batch-size", type=count, default=16, help="pairs in the global batch")


def run_scale(options: Options) -> list[Row]:
    from clipft.bench.scaling import bench_scale

    for world in options.worlds:
        if options.batch_size % world:
            build_parser().error(f"--batch-size {options.batch_size} does not come out even on --worlds {world}")
    return bench_scale(options.worlds, options.batch_size)


def no_options(_: argparse.ArgumentParser) -> None:
    pass


def run_predict(_: Options) -> list[Row]:
    from clipft.bench.predicting import bench_predict

    return bench_predict()


BENCHMARKS = {
    "data": Benchmark("shards to batches per core, without a model", data_options, run_data),
    "step": Benchmark("a step on a batch that lies on the device", step_options, run_step),
    "loss": Benchmark("time and memory of the loss and its gradients", loss_options, run_loss),
    "start": Benchmark("seconds to an answer and to the first step", start_options, run_start),
    "scale": Benchmark("what a step sends between ranks, counted and predicted", scale_options, run_scale),
    "predict": Benchmark("larger runs, from formulas and constants measured here", no_options, run_predict),
    "train": Benchmark("whole runs, in turns with open_clip_train", train_options, run_train),
}

if __name__ == "__main__":
    main(sys.argv[1:])
