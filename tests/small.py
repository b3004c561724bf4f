"""A model and a data set that train in a second, for tests of whole runs."""

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from clipft.config import Config, PackConfig
from clipft.data.pack import pack

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
RESNET_CFG = MODEL_CFG | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def make_model(folder: Path, model_cfg: dict[str, Any] = MODEL_CFG) -> Path:
    """A local open_clip folder with random weights."""
    from clipft.model.build import build, description

    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = build("small", model_cfg, {})
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(description(clip)))
    save_file(
        {k: v.contiguous() for k, v in clip.model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def make_data(folder: Path, num_train: int = 40, num_other: int = 12, damaged: int = 0) -> Path:
    """Packed shards of two-coloured squares: train (of which some are cut off), val, test, with classes."""
    source = folder / "source"
    (source / "images").mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    for i, split in enumerate(["train"] * num_train + ["val"] * num_other + ["test"] * num_other):
        left, right = draw.choice(list(COLOURS), 2)
        pixels = np.zeros((20, 24, 3)) + np.array(COLOURS[left])
        pixels[:, 12:] = COLOURS[right]
        pixels = (pixels + draw.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        raw = io.BytesIO()
        Image.fromarray(pixels).save(raw, "PNG")
        whole = raw.getvalue()
        (source / "images" / f"{i}.png").write_bytes(whole[: len(whole) // 2] if i < damaged else whole)
        captions = [f"{left} beside {right}", f"a {right} half right of a {left} one"]
        rows.append({"image": f"images/{i}.png", "captions": captions, "label": str(left), "split": split})
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(PackConfig(source=str(source), out=str(folder / "packed"), shard_samples=16))
    return folder / "packed"


def make_world(folder: Path) -> Path:
    """The folder, with a model and data that make_config names."""
    make_model(folder / "model")
    make_data(folder / "data")
    return folder


def make_config(root: Path, *overrides: str) -> Config:
    """The config of a run of a few steps under root/runs, changed by overrides such as "train.seed=3"."""
    base = [
        f"runs_dir={root}/runs",
        "name=run",
        f"model.name={root}/model",
        "model.pretrained=null",
        f"data.path={root}/data/packed",
        "data.name=squares",
        "data.workers=0",
        "optim.lr=0.01",
        "train.batch_size=8",
        "train.max_steps=6",
        "eval.every=2",
        "checkpoint.every=2",
    ]
    node = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist([*base, *overrides]))
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def train_here(config: Config) -> tuple[int, Path]:
    """Settles and trains in this process; exit code and run folder."""
    from clipft import run
    from clipft.plan import resolve
    from clipft.rank import stoppable
    from clipft.ranks import joined
    from clipft.rundir import load_config, settle

    path = settle(resolve(config)).path
    config = load_config(path / "config.yaml", Config)
    with stoppable() as stop, joined(config.trainer) as ranks:
        return run.train(config, path, ranks, stop), path


def outcome(path: Path) -> dict[str, Any]:
    """What a run left: losses and validations by step, the results, a hash of the weights, the files' names."""
    weights = hashlib.sha256()
    for value in torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].values():
        weights.update(value.numpy().tobytes())
    results = json.loads((path / "results.json").read_text())
    results["meta"] = results["meta"]["gallery"]  # the rest repeats the config
    with (path / "metrics.csv").open() as text:
        timeless = ("train/samples_per_s", "train/data_wait_frac")
        rows = [{k: v for k, v in row.items() if k not in timeless} for row in csv.DictReader(text)]
    names = (str(file.relative_to(path)) for file in path.rglob("*"))
    files = sorted(name for name in names if "wandb" not in name and name != ".lock")
    return {"rows": rows, "results": results, "weights": weights.hexdigest(), "files": files}


def wait_for(done: Callable[[], bool]) -> None:
    """Returns when it is so."""
    deadline = time.monotonic() + 90
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
