"""The steps of a run: its parts joined to Lightning's Trainer, from the state that was found to the end or a stop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int64, UInt8
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from clipft.capacity import out_of_memory
from clipft.config import Config, Every, parse_every
from clipft.data.augment import Augment
from clipft.data.kept import Kept
from clipft.data.loader import Batch, train_loader
from clipft.data.mix import Mix
from clipft.data.order import Order
from clipft.data.pairs import Units
from clipft.data.waiting import WaitingLoader, naming_lost_workers
from clipft.judge.evaluate import evaluating
from clipft.learn.after_step import AfterStep, Intervals, Validate
from clipft.learn.checkpoint import Found, said_by
from clipft.learn.gather import all_objects
from clipft.learn.journal import Journal
from clipft.learn.ledger import Ledger, account
from clipft.learn.losses import bias_of_softmax, build_loss, chance_loss
from clipft.learn.metrics_file import MetricsFile
from clipft.learn.module import ContrastiveModule, Plan
from clipft.learn.saver import Saver
from clipft.learn.skips import Skips
from clipft.learn.step import Tower, Towers, gather_pairs, local_pairs
from clipft.learn.stop import StopRequest
from clipft.measure import Measure
from clipft.model.blocks import AS_THEY_ARE, Blocks
from clipft.model.compiled import TEXT_BUCKET, compiled_blocks
from clipft.model.encode import encode_image, encode_text, to_float, trim_tokens
from clipft.model.groups import is_frozen
from clipft.model.load import Clip
from clipft.plan import Steps
from clipft.ranks import Ranks, meet
from clipft.report import tell
from clipft.rundir import log

STOP_BROADCAST = "_broadcast_sigterm_tensor"  # of Lightning's training loop


@dataclass(frozen=True)
class Job:
    """What does not change in a run."""

    config: Config
    folder: Path
    units: Units
    order: Order
    steps: Steps
    measure: Measure
    augment: Augment
    multipliers: dict[str, float]
    """Of the learning rate, by parameter."""
    micro_batch: int
    meta: dict[str, Any]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """Features of locked towers, by tower (train.cache_features)."""


def fit(job: Job, validate: Validate, found: Found, loggers: list[Logger], stop: StopRequest) -> bool:
    """Trains from the state that was found; true when it was stopped before the end."""
    config, clip, ranks = job.config, job.measure.clip, job.measure.ranks
    journal = Journal(
        MetricsFile(job.folder / "metrics.csv", found.step) if ranks.first else None,
        loggers,
        partial(log, job.folder),
        batch_size=config.train.batch_size,
        chance=chance_loss(config.loss.name, config.train.batch_size),
        num_steps=job.steps.total,
        first_step=found.step,
    )
    about = {"world_size": ranks.world, **{key: job.meta[key] for key in ("config_sha256", "fingerprint", "versions")}}
    saver = Saver(config.checkpoint.keep, about, journal.print)
    after = AfterStep(
        job.folder / "checkpoints",
        journal,
        saver=saver,
        stop=stop,
        ledger=Ledger(config.data.max_bad_frac, job.steps.total * config.train.batch_size, identity(job)),
        skips=Skips(config.train.max_skipped, journal.print),
        every=Intervals(
            save=parse_every("checkpoint.every", config.checkpoint.every) or Every(),
            evaluate=parse_every("eval.every", config.eval.every) or Every(steps=job.steps.per_epoch),
        ),
        validate=validate,
        validate_first=config.eval.base and not found.step,
        select=config.eval.select,
        patience=config.train.patience,
        best_is_lost=not found.best,
        lag=host_lag(ranks),
    )
    loss = build_loss(config.loss.name, config.loss.duplicates, config.loss.label_smoothing)
    towers = towers_of(clip, compiled_blocks() if config.train.compile else AS_THEY_ARE)
    module = ContrastiveModule(clip.model, towers, loss, config.optim, build_plan(job))
    trainer = build_trainer(ranks, config.trainer.precision, after, saver)
    # Several ranks stop at the end of a step alone: the others are in it already, and wait for this one.
    leave = (lambda: after.leave(trainer, module)) if ranks.world == 1 else None
    loader = batches(job, found.step, job.steps.total, job.measure.workers, leave)
    try:
        with naming_lost_workers(loader):
            trainer.fit(module, loader, ckpt_path=found.path, weights_only=True)
    except RuntimeError as error:
        advice = out_of_memory(error, config, job.folder, ranks, job.micro_batch)
        if advice is None:
            raise
        raise advice from error
    finally:
        saver.wait()
    saver.finish()
    late = [reason for reason in all_objects(stop.received) if reason]  # while the last step was measured or saved
    stop.agreed = stop.agreed or (late[0] if late else "")
    if not stop.agreed and not after.gave_up and module.step < job.steps.total:
        raise RuntimeError(f"training ended at step {module.step} of {job.steps.total}, and nobody had asked for it")
    if stop.agreed:
        journal.print(
            f"Stopped at step {module.step} of {job.steps.total} ({stop.agreed}), saved. "
            "The same command goes on from there."
        )
        tell(stopped=module.step, reason=stop.agreed)
    meet(ranks)  # the others read what the first has written
    return bool(stop.agreed)


def is_over(config: Config, steps: Steps, found: Found) -> bool:
    """Whether the state that was found is the run's last: at its end, or at that of its patience."""
    counts = found.best and found.said.get("select") == config.eval.select  # else they are those of something else
    patience = config.train.patience
    return found.step >= steps.total or (patience is not None and counts and found.said["since_best"] >= patience)


def build_plan(job: Job) -> Plan:
    config, steps = job.config, job.steps
    assert config.optim.lr is not None
    return Plan(
        num_steps=steps.total,
        warmup_steps=steps.warmup,
        batch_size=config.train.batch_size,
        micro_batch=job.micro_batch,
        lr=config.optim.lr,
        multipliers=job.multipliers,
        ema=config.train.ema,
        seed=config.train.seed,
        train_batch_norm=config.train.batch_norm == "train",
        clamp_scale=config.loss.name == "clip",
        with_ids=config.loss.positives != "pair",
        gather_dtype=None if config.loss.gather_dtype is None else torch.bfloat16,
    )


def set_bias(job: Job) -> str:
    """Starts a new logit_bias at what the trained model's softmax says of the first batch; returns a note of it.

    After a softmax cosines are not centred at 0, and AdamW moves a bias by no more than the rate in a step. A small
    model tuned on emoji (120 steps) started at a loss of 9.2 and came to R@10 0.135; from the log odds and a scale of
    10, as new models start, at 18.0 and to 0.083.
    """
    clip, ranks, towers = job.measure.clip, job.measure.ranks, towers_of(job.measure.clip)
    batch = next(iter(batches(job, 0, num_steps=1, workers=0))).to(ranks.device)
    micros = batch.split(job.micro_batch)
    with evaluating(clip.model), torch.no_grad():
        with ranks.autocast():
            sides = [[tower.encode(micro) for micro in micros] for tower in (towers.image, towers.text)]
        image, text = (torch.cat(parts) for parts in sides)
        local, counts = local_pairs(image, text, batch, job.config.train.batch_size)
        _, everyone = gather_pairs(local, counts, with_ids=True)
        scale = clip.model.logit_scale.float().exp().squeeze()
        bias = bias_of_softmax(everyone, scale)
        clip.model.logit_bias.copy_(torch.where(bias.isfinite(), bias, clip.model.logit_bias))  # no pair was a negative
    return (
        f"new logit_bias of {clip.model.logit_bias.item():.2f} beside its scale of {scale.item():.4g}, for "
        "loss.name=siglip: on the first batch its sigmoids say what its softmax said"
    )


def batches(
    job: Job, start_step: int, num_steps: int, workers: int, leave: Callable[[], None] | None = None
) -> WaitingLoader:
    """This rank's slices of the global batches, from this step to `num_steps`, or to where `leave` ends them."""
    config, measure, ranks = job.config, job.measure, job.measure.ranks
    return train_loader(
        job.units,
        augment=job.augment,
        tokenize=tokenizer(measure.clip, measure.trim, TEXT_BUCKET if config.train.compile else 1),
        max_pixels=config.data.max_pixels,
        positives=config.loss.positives,
        group=config.loss.group,
        text_errors=config.data.text_errors,
        seed=config.train.seed,
        order=job.order,
        num_steps=num_steps,
        rank=ranks.rank,
        world=ranks.world,
        start_step=start_step,
        workers=workers,
        pin=ranks.device.type == "cuda",
        wait=replace(measure.wait, leave=leave),
        kept=job.kept,
    )


def identity(job: Job) -> str:
    """What the slots of the run are filled with."""
    data, steps = job.meta["fingerprint"]["train"], job.steps
    steps_of = f"{steps.per_epoch} steps of {job.config.train.batch_size} an epoch"
    return f"{data}, {steps.num_units} units, {steps_of}, seed {job.config.train.seed}"


def ending(job: Job) -> dict[str, Any]:
    """What results.json says of a run that ended before its last step; nothing of one that did not."""
    said, config = said_by(job.folder / "checkpoints" / "last.ckpt"), job.config
    if said["step"] >= job.steps.total:
        return {}
    why = f"val {config.eval.select} had not improved in {said['since_best']} validations"
    ended = {"step": said["step"], "of": job.steps.total, "best_step": said["best_step"]}
    return {"ended_early": {**ended, "reason": f"{why} (train.patience={config.train.patience})"}}


def reached(job: Job) -> dict[str, Any]:
    """What became of the samples up to the last saved state (ledger), and what chose best.ckpt (selected)."""
    state, train = said_by(job.folder / "checkpoints" / "last.ckpt"), job.units.samples
    ledger = account(
        state["ledger"],
        num_units=None if isinstance(job.order, Mix) else job.steps.num_units,
        per_epoch=job.steps.per_epoch,
        batch_size=job.config.train.batch_size,
        step=state["step"],
        incomplete=train.dropped,
        examples=train.examples,
    )
    selected = {"metric": state["select"], "value": state["best_value"], "step": state["best_step"]}
    return {"ledger": ledger, "selected": selected if state["best_step"] else None}


def build_trainer(ranks: Ranks, precision: str | None, after: AfterStep, saver: Saver) -> pl.Trainer:
    """Lightning's Trainer for one pass over the loader, whose length is the whole run."""
    several = ranks.world > 1
    # Our process group stands already; Lightning joins it. Gradients live in DDP's buckets, not beside them.
    strategy = DDPStrategy(gradient_as_bucket_view=True) if several else "auto"
    # Named, because under Slurm Lightning would take over the ranks and the signals.
    environment = TorchElasticEnvironment() if several else LightningEnvironment()
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(ranks.device.type, ranks.device.type),
        devices=ranks.local_world if several else 1,
        num_nodes=ranks.world // ranks.local_world,
        strategy=strategy,
        precision=precision or ranks.precision,  # pyright: ignore[reportArgumentType]
        plugins=[saver, environment],
        callbacks=[after],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    switch_off_stop_broadcast(trainer)
    return trainer


def switch_off_stop_broadcast(trainer: pl.Trainer) -> None:
    """Saves a collective and a wait for the device per step: our reduction says who was asked to stop."""
    loop = trainer.fit_loop.epoch_loop
    if not callable(getattr(loop, STOP_BROADCAST, None)):
        raise RuntimeError(f"this pytorch-lightning has no {STOP_BROADCAST}: see what its loop sends at each step now")
    setattr(loop, STOP_BROADCAST, lambda: None)


def towers_of(clip: Clip, blocks: Blocks = AS_THEY_ARE) -> Towers:
    """Both encoders; features that a batch brings along are taken as they are."""

    def image(batch: Batch) -> Tensor:
        return image_features(clip, batch.pixels, blocks) if batch.image is None else batch.image

    def text(batch: Batch) -> Tensor:
        return text_features(clip, batch.tokens, blocks) if batch.text is None else batch.text

    return Towers(
        image=Tower(image, trained=not is_frozen(clip.model, "image")),
        text=Tower(text, trained=not is_frozen(clip.model, "text")),
    )


def image_features(clip: Clip, pixels: UInt8[Tensor, "b 3 S S"], blocks: Blocks = AS_THEY_ARE) -> Float[Tensor, "b D"]:
    """Features of images, whose pixels are normalised on the device."""
    return encode_image(clip.model, to_float(pixels, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]), blocks)


def text_features(clip: Clip, tokens: Int64[Tensor, "b n"], blocks: Blocks = AS_THEY_ARE) -> Float[Tensor, "b D"]:
    """Features of captions, whose tokens the loader has cut."""
    return encode_text(clip.model, tokens, False, blocks)


def tokenizer(clip: Clip, trim: bool, multiple: int = 1):
    """Captions -> tokens, cut to the longest of them, or a multiple of so many, where that is exact."""

    def tokenize(captions: list[str]) -> Tensor:
        tokens = clip.tokenize(captions)
        return trim_tokens(clip.model, tokens, multiple) if trim else tokens

    return tokenize


def host_lag(ranks: Ranks) -> int:
    """Steps after which the host reads a step's numbers: on a GPU they are there by then without waiting."""
    return 1 if ranks.device.type == "cuda" else 0
