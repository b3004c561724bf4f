"""What a run will do, worked out from its config before anything heavy is imported."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from clipft.conf_files import named_data
from clipft.config import Config, DataConfig
from clipft.data.caption import group_of, written_captions
from clipft.data.index import Samples
from clipft.data.lanes import Lanes
from clipft.data.mix import BLOCK, Mix, shares
from clipft.data.order import Order, Shuffle, largest_share
from clipft.data.pairs import Units, build_units
from clipft.data.remote.addresses import shown
from clipft.data.remote.ahead import most_at_once
from clipft.data.sample import TEXT_KINDS, BadSample
from clipft.data.split import Splits, find_shards, load_splits
from clipft.learn.optimizer_names import check_optimizer
from clipft.model.check import check_model, check_reachable
from clipft.model.sources import base_run
from clipft.report import megabytes
from clipft.rundir import load_config

if TYPE_CHECKING:  # both import torch, and the command line must answer before that
    from torch import nn

    from clipft.model.load import Clip
    from clipft.ranks import Ranks

LOOKED_AT = 20  # samples that are looked at for captions before anything starts
WINDOW_SHARDS = 8
MOST_EPOCHS = 3  # whose windows are looked at for the cache
TOY_PATH = "data/toy"  # of conf/data/toy.yaml; a folder of the user's that is called toy lies elsewhere
FINE_TUNING_LR = 1e-5  # of full fine-tuning; the rate of FLYP (Goyal et al. 2023)


@dataclass(frozen=True)
class Steps:
    num_units: int
    """Images or pairs of an epoch, before the remainder is left out."""
    per_epoch: int
    total: int
    warmup: int


def resolve(config: Config) -> Config:
    """The config with what depends on its base filled in; raises for all that cannot work."""
    make_toy_data(config.data)
    check_model(config.model)
    check_optimizer(config.optim)
    splits = load_splits(config.data)
    other_data(config)
    units = units_of(config, splits)
    order = order_of(config, splits, units)
    check_cache(config, splits, order)  # before anything is downloaded
    check_captions(splits, config.loss.group)
    count_steps(config, order, len(units))
    if config.train.batch_size < config.trainer.devices:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} is less than trainer.devices={config.trainer.devices}: "
            "some devices would have no sample."
        )
    check_batch_norm(config, config.trainer.devices, config.train.micro_batch or config.train.batch_size)
    check_reachable(config.model)
    lr = config.optim.lr if config.optim.lr is not None else default_lr(base_run(config.model))
    return replace(
        config,
        optim=replace(config.optim, lr=lr),
        data=replace(config.data, name=config.data.name or splits.name),
    )


def make_toy_data(config: DataConfig) -> None:
    """The data set of conf/data/toy.yaml is drawn when it is first asked for."""
    if config.name == "toy" and config.path == TOY_PATH:
        from clipft.data.toy import make_toy

        make_toy(Path(config.path))


def other_data(config: Config) -> tuple[list[DataConfig], list[str]]:
    """What is measured besides the run's own data (eval.also, and what a base run was trained on), and notes."""
    found, notes = [], []
    for name in config.eval.also:
        try:
            find_shards(named_data(name))
        except ValueError as error:
            raise ValueError(f"eval.also: {name!r} cannot be measured. {error}") from error
        found.append(named_data(name))
    if run := base_run(config.model):
        base = replace(load_config(run / "config.yaml", Config).data, allow_pipe=False)  # the run may be another's
        try:
            find_shards(base)
            found.append(base)
        except ValueError:
            where = base.path or base.test or base.val or base.train
            notes.append(f"forgetting is not measured: {base.name}, its base was trained on, is not here ({where})")
    return found, notes


def units_of(config: Config, splits: Splits) -> Units:
    """What an epoch holds each of once: images, or pairs of an image and a caption."""
    if splits.train is None:
        raise ValueError("data.train is empty: this data set has no training shards. Give data.train=SHARDS.")
    return build_units(splits.train, config.data.captions, splits.text_errors)


def order_of(config: Config, splits: Splits, units: Units) -> Order:
    """The order that the config asks for: all shuffled, in lanes, or mixed by weight."""
    batch_size, seed, lanes = config.train.batch_size, config.train.seed, config.data.lanes
    sizes = units.per_shard()
    if splits.mix and lanes:
        raise ValueError(f"data.lanes={lanes} would be ignored: sources with weights are shuffled each by itself.")
    if splits.mix:
        return mix_of(config, splits, sizes)
    if lanes:
        return Lanes(seed, tuple(sizes.tolist()), batch_size, lanes, config.data.window_shards or WINDOW_SHARDS)
    return Shuffle(seed, len(units), batch_size)


def mix_of(config: Config, splits: Splits, sizes: Int64[np.ndarray, " shards"]) -> Mix:
    if config.train.max_steps is None:
        raise ValueError(
            "train.max_steps is needed: sources with weights come to their ends at different times, so that there is "
            "no epoch to count (train.epochs)."
        )
    ends = np.cumsum([num_shards for num_shards, _ in splits.mix])
    per_source = tuple(int(part.sum()) for part in np.split(sizes, ends[:-1]))
    weights = tuple(weight for _, weight in splits.mix)
    if not all(per_source):
        raise ValueError(
            f"data.train: source {per_source.index(0) + 1} has no sample left to train on. Leave it out, or give "
            "data.val so that nothing of it is held out."
        )
    shares(weights)
    return Mix(config.train.seed, per_source, weights, config.train.batch_size, config.train.max_steps)


def count_steps(config: Config, order: Order, num_units: int) -> Steps:
    per_epoch = order.per_epoch
    total = config.train.max_steps or per_epoch * config.train.epochs
    warmup = round(config.optim.warmup_frac * total)
    if config.optim.warmup_frac and total > 1 and warmup >= total:
        raise ValueError(f"optim.warmup_frac={config.optim.warmup_frac} warms up for all {total} steps.")
    return Steps(num_units, per_epoch, total, warmup)


def check_cache(config: Config, splits: Splits, order: Order) -> None:
    """Raises where the cache of shards that lie elsewhere holds less than what is read at the same time."""
    parts = {"train": splits.train, "val": None if splits.held_out else splits.val, "test": splits.test}
    remote = next((part.remote for part in parts.values() if part and part.remote), None)
    if remote is None:
        return
    sizes = {split: bytes_elsewhere(part) for split, part in parts.items()}
    whole = sum(map(sum, sizes.values()))
    lanes = isinstance(order, Lanes) and not splits.held_out
    train = most_at_once(order, sizes["train"], MOST_EPOCHS) if lanes else sum(sizes["train"])
    others = sum(sizes["val"]) + sum(sizes["test"])
    if train + others <= remote.cache.limit:
        return
    if splits.held_out:
        what = "of train all, because val is held out of all its shards"
        todo = "give val shards of its own (data.val) and read train in lanes (data.lanes)"
    elif isinstance(order, Lanes):
        what = f"of train two windows of data.lanes={order.lanes} times data.window_shards={order.window_shards} shards"
        todo = "lower data.lanes or data.window_shards"
    else:
        what, todo = "of train all, because all its shards are shuffled together", "read it in lanes, data.lanes=8 say"
    raise ValueError(
        f"data.cache_size={config.data.cache_size} is less than the {megabytes(train + others)} (of {megabytes(whole)} "
        f"in all) that are needed at once: {what} ({megabytes(train)}), and val and test ({megabytes(others)}). Raise "
        f"it, or {todo}."
    )


def to_come(samples: Samples, i: int) -> str:
    """What to say before a sample is read whose shard has to be downloaded for it; "" where it is there."""
    assert samples.remote is not None
    shard = samples.remote.shards.get(samples.shards[samples.rows[i, 0]])
    if shard is None or samples.remote.cache.has(shard):
        return ""
    return f"downloading {shown(shard.address)} ({megabytes(shard.size or 0)}) to look at its captions"


def bytes_elsewhere(samples: Samples | None) -> list[int]:
    """Bytes of each shard that is read by way of the cache, 0 for the others."""
    if samples is None or samples.remote is None:
        return [0] * len(samples.shards if samples else ())
    away, sizes = samples.remote.shards, samples.stamps[:, 0].tolist()
    return [size if path in away else 0 for path, size in zip(samples.shards, sizes, strict=True)]


def check_captions(splits: Splits, group: str | None) -> None:
    """Raises where training samples from all over have no captions (labels are no text to train on) or groups."""
    assert splits.train is not None
    near = splits.train.rows[:, 0] == splits.train.rows[0, 0]
    # Elsewhere only in the first shard, which is downloaded for it.
    there = np.flatnonzero(near) if splits.train.remote else np.arange(len(near))
    if splits.train.remote and (said := to_come(splits.train, int(there[0]))):
        print(said, file=sys.stderr, flush=True)
    looked_at = there[np.linspace(0, len(there) - 1, min(LOOKED_AT, len(there))).astype(int)].tolist()
    read = partial(splits.train.read, kinds=TEXT_KINDS)
    if not any(succeeds(lambda i=i: written_captions(read(i), splits.text_errors)) for i in looked_at):
        raise ValueError(
            f"data.train: none of {len(looked_at)} samples from all over {splits.name} has a caption (key.txt, or "
            "captions in key.json). Sets with labels only can be measured (clipft evaluate), not trained on."
        )
    column = group or ""
    if column and not any(succeeds(lambda i=i: group_of(read(i), column, splits.text_errors)) for i in looked_at):
        raise ValueError(
            f"loss.group={group!r}: none of {len(looked_at)} samples from all over {splits.name} has this column in "
            "key.json."
        )


def succeeds(read: Callable[[], Any]) -> bool:
    """Whether there is something to read."""
    try:
        return bool(read())
    except BadSample:
        return False


def default_lr(base: Path | None) -> float:
    """For our own runs a tenth of what they were trained with: small models want more than large ones."""
    if base is None:
        return FINE_TUNING_LR
    lr = load_config(base / "config.yaml", Config).optim.lr
    return max(FINE_TUNING_LR, (lr or 0.0) / 10)


def plan_lines(
    config: Config,
    splits: Splits,
    order: Order,
    steps: Steps,
    clip: "Clip",
    ranks: "Ranks",
    multipliers: dict[str, float],
    trim: bool,
    micro: int,
    done: int,
) -> list[str]:
    """What is about to happen, for the terminal."""
    from clipft.learn.memory import kept_beside
    from clipft.model.tune import tune_table

    batch, share = config.train.batch_size, largest_share(config.train.batch_size, ranks.world)
    parameters = [parameter for parameter in clip.model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in parameters)
    total = sum(parameter.numel() for parameter in clip.model.parameters())
    gigabytes = 4 * (total + trainable + kept_beside(config, clip.model)) / 1e9
    sizes = ", ".join(f"{name} {len(part):,}" for name in ("train", "val", "test") if (part := getattr(splits, name)))
    assert config.optim.lr is not None
    table = tune_table(clip.model, multipliers, config.optim.lr)
    pairs = f" ({steps.num_units:,} pairs)" if config.data.captions == "all" else ""
    left = steps.num_units - steps.per_epoch * batch
    epoch = f"{steps.per_epoch:,} an epoch ({left} left out each time, others each time)"
    lines = [
        f"run     {config.runs_dir}/{config.name}"
        + (f" (goes on at step {done:,} of {steps.total:,})" if done else ""),
        f"data    {splits.name}: {sizes}{pairs}",
        *(f"        {note}" for note in [*splits.notes, *data_notes(config, order)]),
        f"model   {clip.name}: {total / 1e6:.1f}M parameters, {trainable / 1e6:.1f}M trainable",
        *(f"        {note}" for note in [*clip.notes, *model_notes(config, clip.model)]),
        *(f"{'' if number else 'tune':<8}{line}" for number, line in enumerate(table)),
        f"steps   {steps.total:,} of {batch} pairs, {'' if isinstance(order, Mix) else f'{epoch}, '}"
        f"warm-up {steps.warmup:,}, lr {config.optim.lr:.1e}, ln(B) {math.log(batch):.3f}",
        *average_line(config.train.ema, steps.total),
        f"device  {ranks.world} x {ranks.device.type}, {ranks.precision}, {share} pairs each, {micro} at a time",
        f"memory  {gigabytes:.2f} GB a device for weights, gradients and {config.optim.name}, plus activations",
        f"text    {text_line(trim, config.train.compile)}",
    ]
    return lines


def text_line(trim: bool, compiled: bool) -> str:
    """How long captions are."""
    from clipft.model.compiled import TEXT_BUCKET

    if not trim:
        return "full length"
    upwards = f", up to a multiple of {TEXT_BUCKET} tokens" if compiled else ""
    return f"cut after the longest caption of a batch{upwards} (exact for this tower)"


def average_line(ema: float | None, num_steps: int) -> list[str]:
    """How far the average reaches, where there is one."""
    if ema is None:
        return []
    what = f"average of the trained weights, about the last {1 / (1 - ema):,.0f} steps"
    return [f"ema     {what} (the start weighs {ema**num_steps:.1%} of it at the end); validated, measured, exported"]


def data_notes(config: Config, order: Order) -> list[str]:
    """What about the pairs and their order their user has to know."""
    notes = []
    if config.data.captions == "all" and config.loss.positives in ("caption", "pair"):
        notes.append(
            "captions of one image can meet in a batch, as negatives of each other (loss.positives=image changes that)"
        )
    if isinstance(order, Lanes):
        notes.append(
            f"{order.lanes} lanes, each shuffled within {order.window_shards} shards: {order.same_shard_pairs():.1f} "
            f"pairs of one shard in a batch, {order.shuffled_same_shard_pairs():.1f} if all were shuffled"
        )
    if isinstance(order, Mix):
        for number, (size, quota) in enumerate(zip(order.sizes, shares(order.weights), strict=True), 1):
            share = quota / BLOCK
            rounds = order.num_steps * order.batch_size * share / size
            notes.append(f"source {number}: {size:,} pairs, {share:.2%} of the batches, seen {rounds:.1f} times")
            if size < share * order.batch_size:
                alike = "negatives" if config.loss.positives == "pair" else "positives"
                notes.append(f"source {number} fits into a batch more than once: its pairs meet themselves as {alike}")
        if config.eval.every is None:
            notes.append("validated once, at the end: a mix has no epoch (eval.every=STEPS changes that)")
    return notes


def model_notes(config: Config, model: "nn.Module") -> list[str]:
    """What about a model's parts its user has to know; raises for options that it cannot follow."""
    from clipft.learn.module import MAX_LOGIT_SCALE
    from clipft.model.groups import TOWERS, is_frozen, tower_modules

    notes = []
    trained = [part for tower in TOWERS if not is_frozen(model, tower) for part in tower_modules(model, tower)]
    parts = [part for tower in trained for part in tower.modules()]
    rates = [getattr(part, name, 0) for part in parts for name in ("p", "drop_prob", "prob", "dropout")]
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        notes.append("it drops units at random: another split into devices or micro-batches draws other masks")
    norms = [part for part in parts if "BatchNorm" in type(part).__name__]
    if config.train.batch_norm == "train" and not any(
        each.requires_grad for part in norms for each in part.parameters()
    ):
        raise ValueError("train.batch_norm=train would be ignored: no BatchNorm is trained here. Leave it out.")
    if norms and config.train.batch_norm == "frozen":
        notes.append("BatchNorm keeps the statistics that it has")
    if config.loss.name == "clip" and getattr(model, "logit_bias", None) is not None:
        notes.append("logit_bias stays as it is: loss.name=clip does not see it")
    scale: Any = model.logit_scale
    if config.loss.name == "clip" and scale.requires_grad and scale.max() > MAX_LOGIT_SCALE + 1e-3:
        notes.append("its scale is above 100, to which a learned one is cut (loss.temperature=keep leaves it)")
    return notes


def check_batch_norm(config: Config, world: int, micro: int) -> None:
    """Raises where trained BatchNorm statistics would depend on how the batch is cut."""
    if config.train.batch_norm == "train" and (world > 1 or micro < config.train.batch_size):
        raise ValueError(
            f"train.batch_norm=train needs the whole batch at once, and here are {world} devices with {micro} pairs at "
            "a time: the statistics would be those of the parts. Use one device and a train.batch_size that fits, or "
            "train.batch_norm=frozen."
        )
