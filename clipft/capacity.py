"""How many pairs a device encodes at a time: asked for, remembered, or tried. Loader processes. Room on the disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipft.config import Config
from clipft.data.loader import Batch
from clipft.data.order import largest_share
from clipft.data.waiting import PREFETCH
from clipft.files import replace_file
from clipft.learn.memory import host_memory, is_out_of_memory, kept_beside, largest_that_fits
from clipft.learn.module import train_mode
from clipft.learn.step import Towers
from clipft.model.build import Clip
from clipft.model.options import set_checkpointing
from clipft.ranks import Ranks
from clipft.report import RunFailed, megabytes

REMEMBERED = "micro_batch.json"
FLOAT_BYTES = 4
MOST_WORKERS = 16
LOADER_SHARE = 0.25  # of the free host memory that images of batches ahead may take
BALLAST = 0.1  # of a GPU's memory, kept free in a trial: DDP's buckets, gathered features, the loss, fragments


def choose_micro_batch(config: Config, folder: Path, ranks: Ranks, clip: Clip, towers: Towers) -> int:
    """Pairs at a time, the same on all ranks; what was tried is kept in the run's folder for the next start."""
    share = largest_share(config.train.batch_size, ranks.world)
    if config.train.micro_batch is not None:
        return min(config.train.micro_batch, share)
    found = torch.tensor(remembered(folder, place(config, ranks)) or tried(share, config, ranks, clip, towers))
    if ranks.world > 1:
        found = found.to(ranks.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
    if not int(found):
        raise RunFailed(
            f"{ranks.device.type} has no memory for one pair at a time. Use a smaller model or a larger device."
        )
    if ranks.first:
        remember(folder, place(config, ranks), int(found))
    return int(found)


def place(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What the number depends on."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    return {
        "device": device,
        "devices": ranks.world,
        "precision": ranks.precision,
        "batch_size": config.train.batch_size,
        "grad_checkpointing": config.model.grad_checkpointing,
    }


def remembered(folder: Path, here: dict[str, Any]) -> int | None:
    """The number that was found or lowered under the same conditions."""
    try:
        stored = json.loads((folder / REMEMBERED).read_text())
        return stored["micro_batch"] if stored["conditions"] == here else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(folder: Path, here: dict[str, Any], pairs: int) -> None:
    replace_file(folder / REMEMBERED, json.dumps({"micro_batch": pairs, "conditions": here}, indent=1) + "\n")


def tried(share: int, config: Config, ranks: Ranks, clip: Clip, towers: Towers) -> int:
    """The most pairs that fit beside weights, gradients and what the optimizer keeps."""
    # On a CPU the activations are counted when they are kept, and what is computed again never is: its most, one block
    # of a tower, would be missing. So they are counted as if all were kept, and model.grad_checkpointing saves memory
    # there but does not raise the number by itself.
    counted = config.model.grad_checkpointing and ranks.device.type != "cuda"
    reserve = 0
    if ranks.device.type == "cuda":
        reserve = FLOAT_BYTES * kept_beside(config, clip.model) + int(
            BALLAST * torch.cuda.get_device_properties(ranks.device).total_memory
        )
    ballast = torch.empty(reserve, dtype=torch.uint8, device=ranks.device)

    def try_pairs(pairs: int) -> None:
        batch = full_length_batch(clip, pairs).to(ranks.device)
        with ranks.autocast():
            total = sum(tower.features(batch, graph=True).sum() for tower in (towers.image, towers.text))
        assert isinstance(total, torch.Tensor)
        if total.requires_grad:
            total.backward()
        clip.model.zero_grad(set_to_none=True)

    was_training = clip.model.training
    train_mode(clip.model, batch_norm=False)  # a trial must leave no trace in the statistics
    if counted:
        set_checkpointing(clip.model, False)
    try:
        return largest_that_fits(share, try_pairs, ranks.device, ranks.local_world)
    finally:
        if counted:
            set_checkpointing(clip.model, True)
        clip.model.train(was_training)
        clip.model.zero_grad(set_to_none=True)
        del ballast


def full_length_batch(clip: Clip, pairs: int) -> Batch:
    """Pairs as large as any that can come: captions that fill the context."""
    return Batch(
        pixels=torch.zeros(pairs, 3, clip.side, clip.side, dtype=torch.uint8),
        tokens=clip.tokenize(["word " * 2 * clip.model.context_length]).repeat(pairs, 1).long(),
        valid=torch.ones(pairs, dtype=torch.bool),
        ids=torch.arange(pairs),
        keys=[str(row) for row in range(pairs)],
        bad={},
    )


def num_workers(asked: int | None, ranks: Ranks, clip: Clip, pairs: int, measured: int) -> int:
    """Loader processes of this rank, each with batches ahead: of so many pairs to train, or images to measure.

    All its cores but the one that trains, or as many as there is host memory for: a batch of 32k images takes 5 GB to
    train with, and four times that to measure, where open_clip's transform gives floats.
    """
    if asked is not None:
        return asked
    wanted = min(MOST_WORKERS, ranks.cores() - 1)
    largest = max(pairs, FLOAT_BYTES * measured) * 3 * clip.side**2
    ahead = (PREFETCH + 1) * largest  # with the one that is being made
    room = LOADER_SHARE * host_memory() / ranks.local_world
    return wanted if room >= wanted * ahead else max(1, int(room // ahead))


def out_of_memory(error: BaseException, config: Config, folder: Path, ranks: Ranks, micro: int) -> RunFailed | None:
    """What to tell the user when memory ran out in a step, half being remembered for the next start; else None."""
    if not is_out_of_memory(error):
        return None
    half = max(1, micro // 2)
    if config.train.micro_batch is None and micro > 1:
        remember(folder, place(config, ranks), half)
        advice = f"The same command goes on from the last saved state with {half} at a time"
    else:
        advice = f"Use train.micro_batch={half}" if micro > 1 else "Use a smaller model"
    return RunFailed(
        f"rank {ranks.rank} ran out of memory with {micro} pairs at a time. {advice}; the result is the same. "
        "Other ways: trainer.precision=bf16-mixed, more trainer.devices, a smaller train.batch_size (which changes "
        "the result)."
    )


def state_bytes(config: Config, clip: Clip) -> int:
    """Size of a saved state: weights, and what is kept beside them."""
    weights = sum(value.numel() for value in clip.model.state_dict().values())
    return FLOAT_BYTES * (weights + kept_beside(config, clip.model))


def check_disk(config: Config, folder: Path, clip: Clip, num_there: int) -> list[str]:
    """Raises where not even one state fits on the disk; a note where those that are to be kept may not."""
    size, free, keep = state_bytes(config, clip), shutil.disk_usage(folder).free, config.checkpoint.keep
    wanted = (keep + 2 - num_there) * size  # best.ckpt, and the one that is being written
    if free < size * 1.1:
        raise ValueError(
            f"runs_dir: {folder} has {megabytes(free)} of room and one saved state needs {megabytes(size)}. "
            "Make room, or put runs_dir on another disk."
        )
    if free < wanted:
        return [
            f"disk: {free / 1e9:.2f} GB of room, {wanted / 1e9:.2f} GB wanted for checkpoint.keep={keep}, best and one "
            "being written"
        ]
    return []
