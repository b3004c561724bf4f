"""Whole runs of clipft and of open_clip_train on the same weights and shards, each in a fresh process."""

import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOOK = Path(__file__).parent / "hook"
CLIPFT = "import sys; from clipft.cli import main; sys.exit(main(sys.argv[1:]))"
LR, WEIGHT_DECAY, MAX_NORM = 1e-5, 0.1, 1.0


@dataclass(frozen=True)
class Task:
    """What both train: a folder with the model as open_clip reads it, and shards with one caption per sample."""

    folder: Path
    shards: list[str]
    num_samples: int
    batch_size: int
    steps: int
    workers: int
    device: str
    precision: str
    """fp32, or bf16 with master weights in fp32."""
    whole_images: bool = False
    """No random crop: both see the same pixels where the sources are square."""


@dataclass(frozen=True)
class Ran:
    step_ends: list[float]
    """Seconds from the start of the process to the end of each optimizer step."""
    first_loss: float


def ours(task: Task, name: str) -> Ran:
    """A run of `clipft train`, without the measurement of the base."""
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[task.precision]
    shards = "[" + ",".join(f"'{shard}'" for shard in task.shards) + "]"
    options = [
        f"name={name}",
        f"runs_dir={task.folder}/runs",
        f"model={task.folder}/model",
        f"data.train={shards}",
        f"data.val=['{task.folder}/val/00000.tar']",
        f"data.workers={task.workers}",
        f"data.augment={'none' if task.whole_images else 'light'}",
        f"train.batch_size={task.batch_size}",
        f"train.micro_batch={task.batch_size}",
        f"train.max_steps={task.steps}",
        f"optim.lr={LR}",
        f"optim.weight_decay={WEIGHT_DECAY}",
        f"optim.max_norm={MAX_NORM}",
        "optim.warmup_frac=0",
        "eval.base=false",
        f"eval.every={task.steps}",
        "checkpoint.every=24h",
        f"trainer.precision={precision}",
        f"trainer.accelerator={'gpu' if task.device == 'cuda' else 'cpu'}",
    ]
    step_ends = timed([sys.executable, "-c", CLIPFT, "train", *options], task.folder, name)
    with (task.folder / "runs" / name / "metrics.csv").open() as file:
        first = next(csv.DictReader(file))
    return Ran(step_ends, float(first["train/loss"]))


def theirs(task: Task, name: str, python: str) -> Ran:
    """A run of `open_clip_train.main` in the environment of this Python, with the same maths and its own defaults."""
    arguments = {
        "train-data": "::".join(task.shards),
        "train-num-samples": task.num_samples,
        "dataset-type": "webdataset",
        "batch-size": task.batch_size,
        "epochs": 1,
        "workers": task.workers,
        "model": f"local-dir:{task.folder}/model",
        "device": task.device,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[task.precision],
        "lr": LR,
        "wd": WEIGHT_DECAY,
        "grad-clip-norm": MAX_NORM,
        "warmup": 0,
        "logs": task.folder / "logs",
        "name": name,
        "save-frequency": 0,
        "val-frequency": 0,
    }
    command = [python, "-m", "open_clip_train.main"]
    command += [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    command += ["--aug-cfg", "scale=(1.0, 1.0)"] if task.whole_images else []
    step_ends = timed(command, task.folder, name)
    return Ran(step_ends, float((task.folder / f"{name}.loss").read_text().splitlines()[0]))


def timed(command: list[str], folder: Path, name: str) -> list[float]:
    """Ends of the optimizer steps, in seconds after the process was started."""
    clock, log = folder / f"{name}.clock", folder / f"{name}.log"
    env = {**os.environ, "CLIPFT_BENCH_CLOCK": str(clock), "CLIPFT_BENCH_LOSS": str(folder / f"{name}.loss")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
    start = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode or not clock.exists():
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {done.returncode}:\n{last}")
    return [float(line) - start for line in clock.read_text().splitlines()]
