"""bench train: whole runs beside open_clip_train, in turns, timed from outside by the same hook."""

import json
from dataclasses import replace
from pathlib import Path

from clipft.bench.contenders import Ran, Task, ours, theirs
from clipft.bench.report import Row, ratios, spread
from clipft.bench.shards import draw_samples, first_captions, write_shards
from clipft.config import ModelConfig
from clipft.model.load import load_model
from clipft.ship.folder import CONFIG_NAME, write_folder

SHARDS = 4
GATE = {"fp32": 1e-5, "bf16": 1e-2}  # relative difference of the first losses


def prepare(
    folder: Path,
    *,
    architecture: str,
    data: str | None,
    side: int,
    batch_size: int,
    steps: int,
    workers: int,
    device: str,
    precision: str,
) -> Task:
    """Writes random weights, shards for so many steps, and two pairs to validate on."""
    clip = load_model(ModelConfig(name=architecture, pretrained=None), seed=0)
    (folder / "model").mkdir(parents=True)
    write_folder(clip, folder / "model")
    num = batch_size * steps
    samples = first_captions(data, num) if data else draw_samples(side, num)
    shards = write_shards(folder / "train", samples, per_shard=-(-num // max(SHARDS, workers)))
    write_shards(folder / "val", draw_samples(64, 2), per_shard=2)
    return Task(folder, shards, num, batch_size, steps, workers, device, precision)


def check_equal(task: Task, python: str) -> tuple[float, float]:
    """The first losses on one batch, from the same weights; raises where they differ: then speeds mean nothing.

    The batch has all the pairs there are, in squares of the model's size, so that neither order nor crops matter.
    """
    size = json.loads((task.folder / "model" / CONFIG_NAME).read_text())["preprocess_cfg"]["size"]
    samples = draw_samples(size if isinstance(size, int) else size[0], task.batch_size, square=True)
    shards = write_shards(task.folder / "gate", samples, per_shard=task.batch_size)
    one = {"num_samples": task.batch_size, "steps": 1, "workers": min(1, task.workers)}
    gate = replace(task, shards=shards, whole_images=True, **one)
    mine, other = ours(gate, "gate-ours").first_loss, theirs(gate, "gate-theirs", python).first_loss
    if abs(mine - other) > GATE[task.precision] * abs(other):
        raise RuntimeError(
            f"the first losses differ: {mine!r} (clipft) and {other!r} (open_clip_train). They do not train the same."
        )
    return mine, other


def bench_train(task: Task, python: str, rounds: int, warm_up: int) -> list[Row]:
    """A row for each round and one for all: the speed between the end of the warm-up and the last step."""
    rows, mine, other = [], [], []
    for number in range(rounds):
        mine.append(speed(ours(task, f"ours-{number}"), task, warm_up))
        other.append(speed(theirs(task, f"theirs-{number}", python), task, warm_up))
        rows.append({"round": number + 1, "ours samples/s": mine[-1], "open_clip samples/s": other[-1]})
        rows[-1]["ratio"] = mine[-1] / other[-1]
        print(json.dumps(rows[-1]), flush=True)
    everything = {"ours samples/s": spread(mine), "open_clip samples/s": spread(other), "ratio": ratios(mine, other)}
    return [*rows, {"round": "all", **everything}]


def speed(ran: Ran, task: Task, warm_up: int) -> float:
    """Samples per second after the warm-up steps."""
    if len(ran.step_ends) != task.steps:
        raise RuntimeError(f"{len(ran.step_ends)} optimizer steps were seen, {task.steps} were asked for.")
    return task.batch_size * (task.steps - warm_up) / (ran.step_ends[-1] - ran.step_ends[warm_up - 1])
