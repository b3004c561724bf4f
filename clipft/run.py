"""Where the parts meet: train, evaluate, export, each read from top to bottom."""

import json
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from clipft import __version__
from clipft.capacity import check_disk, choose_micro_batch, out_of_memory
from clipft.config import Config, EvaluateConfig, Every, ExportConfig, ModelConfig, parse_every
from clipft.data.augment import Augment, build_augment
from clipft.data.loader import Batch, naming_lost_workers, train_loader
from clipft.data.mix import Mix
from clipft.data.order import Order
from clipft.data.pairs import Units
from clipft.data.sample import image_of
from clipft.data.split import load_splits
from clipft.files import replace_file
from clipft.judge.evaluate import build_task, judge
from clipft.judge.samples import sample_retrievals
from clipft.judge.table import print_results
from clipft.learn.after_step import AfterStep, Intervals, Validate
from clipft.learn.checkpoint import Found, clean, find_state, said_by, saved_steps
from clipft.learn.gather import all_objects
from clipft.learn.journal import Journal
from clipft.learn.ledger import Ledger, account
from clipft.learn.loggers import build_loggers, each_guarded, log_end
from clipft.learn.losses import build_loss, chance_loss
from clipft.learn.metrics_file import MetricsFile
from clipft.learn.module import ContrastiveModule, Plan, freeze_unused
from clipft.learn.saver import Saver
from clipft.learn.skips import Skips
from clipft.learn.stop import STOPS, StopRequest
from clipft.measure import (
    Measure,
    build_measure,
    check_same_data,
    describe_run,
    facts,
    finish,
    record,
    report_tasks,
    reported,
    validation,
)
from clipft.model.encode import can_trim, encode_image, encode_text, to_float, trim_tokens
from clipft.model.load import RUN_CONFIG, Clip, add_bias, description, load_model
from clipft.model.weights import load_exactly, read_checkpoint
from clipft.plan import Steps, check_batch_norm, count_steps, order_of, plan_lines, units_of
from clipft.ranks import Ranks, check_alike, first_to_all, meet
from clipft.report import tell
from clipft.rundir import load_config, log, read_results, write_results
from clipft.ship.card import card_text
from clipft.ship.folder import CONFIG_NAME, MIN_COSINE, WEIGHTS_NAME, Reloaded, export_folder

MOST_WORKERS = 8
STOP_BROADCAST = "_broadcast_sigterm_tensor"  # of Lightning's training loop
MOST_EXPORT_CHECKS = 2000  # images that plain open_clip encodes again


def train(config: Config, folder: Path, ranks: Ranks, stop: StopRequest) -> int:
    """Fine-tunes from where the run's folder stands, with the base measured first; returns the exit code."""
    quiet_libraries()
    stop.limit_s = (parse_every("train.max_time", config.train.max_time) or Every()).seconds
    splits = load_splits(config.data)
    units = units_of(config, splits)
    order = order_of(config, splits, units)
    steps = count_steps(config, order, len(units))
    clip = load_model(config.model, config.train.seed)
    if config.loss.name == "siglip":
        add_bias(clip, config.train.batch_size)
    freeze_unused(clip.model, config.loss.name)
    meta = describe_run(config, splits, order, steps, clip)
    if ranks.world > 1:  # the checksum reads all weights
        check_alike(facts(config, meta, clip.model))
    found = first_to_all(ranks, lambda: enter(config, folder, clip, steps))
    check_same_data(config, folder, meta, found.step)
    clip.model.to(ranks.device)
    micro = choose_micro_batch(config, folder, ranks, clip, encoder(clip))
    check_batch_norm(config, ranks.world, micro)
    trim = can_trim(clip.model, clip.tokenize)
    workers = num_workers(config.data.workers, ranks)
    measure = build_measure(config.eval, config.data, clip, ranks, trim, workers)
    augment = build_augment(config.data, clip.preprocess_cfg)
    job = Job(config, folder, units, order, steps, measure, augment, micro, meta)
    validate = validation(splits, measure, config.eval.select)
    tasks = report_tasks(config, splits, clip)
    plan = plan_lines(config, splits, order, steps, clip, ranks, trim, micro, found.step)
    if ranks.first:
        replace_file(folder / RUN_CONFIG, json.dumps(description(clip), indent=2) + "\n")
        say = "\n".join([*found.notes, *plan])
        print(say, flush=True)
        log(folder, say)
        write_results(folder, read_results(folder) | {"meta": meta})
    loggers = build_loggers(config, folder) if ranks.first else []
    if config.eval.base and first_to_all(ranks, lambda: "base" not in read_results(folder)):
        record(folder, ranks, "base", [(split, measure(task)) for split, task in tasks], meta)
    if found.step < steps.total and fit(job, validate, found, loggers, stop):
        if ranks.first:
            write_results(folder, read_results(folder) | {"meta": meta | {"ledger": account_of(job)}})
        return STOPS[stop.agreed]
    evaluations = []
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        load_exactly(clip.model, read_checkpoint(path), path)
        evaluations = [(split, measure(task)) for split, task in tasks]
        record(folder, ranks, name, evaluations, meta)
    if ranks.first:
        results = finish(folder, account_of(job))
        retrieved = sample_retrievals(tasks[0][1], evaluations[0][1].embedded) if loggers else []
        each_guarded(loggers, lambda logger: log_end(logger, results, retrieved))
    return 0


def enter(config: Config, folder: Path, clip: Clip, steps: Steps) -> Found:
    """Cleans up after a kill, finds the state to go on from, looks for room on the disk."""
    clean(folder)
    clean(folder / "checkpoints")
    found = find_state(folder / "checkpoints", clip.model)
    if found.step >= steps.total:  # nothing more will be saved
        return found
    there = len(saved_steps(folder / "checkpoints"))
    return replace(found, notes=[*found.notes, *check_disk(folder, clip, config.checkpoint.keep, there)])


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
    micro_batch: int
    meta: dict[str, Any]


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
        best_is_lost=not found.best,
        lag=host_lag(ranks),
    )
    loss = build_loss(config.loss.name, config.loss.duplicates)
    module = ContrastiveModule(clip.model, encoder(clip), loss, config.optim, build_plan(job))
    trainer = build_trainer(ranks, config.trainer.precision, after, saver)
    loader = batches(job, found.step)
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
    if not stop.agreed and module.step < job.steps.total:
        raise RuntimeError(f"training ended at step {module.step} of {job.steps.total}, and nobody had asked for it")
    if stop.agreed:
        journal.print(
            f"Stopped at step {module.step} of {job.steps.total} ({stop.agreed}), saved. "
            "The same command goes on from there."
        )
        tell(stopped=module.step)
    meet(ranks)  # the others read what the first has written
    return bool(stop.agreed)


def build_plan(job: Job) -> Plan:
    config, steps = job.config, job.steps
    assert config.optim.lr is not None
    return Plan(
        num_steps=steps.total,
        warmup_steps=steps.warmup,
        batch_size=config.train.batch_size,
        micro_batch=job.micro_batch,
        lr=config.optim.lr,
        seed=config.train.seed,
        train_batch_norm=config.train.batch_norm == "train",
        with_ids=config.loss.positives != "pair",
    )


def batches(job: Job, start_step: int) -> DataLoader[Batch]:
    """This rank's slices of the global batches, from this step to the end."""
    config, measure, ranks = job.config, job.measure, job.measure.ranks
    return train_loader(
        job.units,
        augment=job.augment,
        tokenize=tokenizer(measure.clip, measure.trim),
        max_pixels=config.data.max_pixels,
        positives=config.loss.positives,
        group=config.loss.group,
        text_errors=config.data.text_errors,
        seed=config.train.seed,
        order=job.order,
        num_steps=job.steps.total,
        rank=ranks.rank,
        world=ranks.world,
        start_step=start_step,
        workers=measure.workers,
        pin=ranks.device.type == "cuda",
    )


def identity(job: Job) -> str:
    """What the slots of the run are filled with."""
    data, steps = job.meta["fingerprint"]["train"], job.steps
    return f"{data}, {steps.num_units} units, {steps.per_epoch} steps of {job.config.train.batch_size} an epoch"


def account_of(job: Job) -> dict[str, Any]:
    """What became of the samples up to the last saved state."""
    state, train = said_by(job.folder / "checkpoints" / "last.ckpt"), job.units.samples
    return account(
        state["ledger"],
        num_units=None if isinstance(job.order, Mix) else job.steps.num_units,
        per_epoch=job.steps.per_epoch,
        batch_size=job.config.train.batch_size,
        step=state["step"],
        incomplete=train.dropped,
        examples=train.examples,
    )


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


def encoder(clip: Clip):
    """Batch -> image and text features, with normalisation on the device."""
    mean, std = clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        image = encode_image(clip.model, to_float(batch.pixels, mean, std))
        return image, encode_text(clip.model, batch.tokens, trim=False)  # the loader has cut the tokens

    return encode


def tokenizer(clip: Clip, trim: bool):
    """Captions -> tokens, cut to the longest of them where that is exact."""

    def tokenize(captions: list[str]) -> Tensor:
        tokens = clip.tokenize(captions)
        return trim_tokens(clip.model, tokens) if trim else tokens

    return tokenize


def host_lag(ranks: Ranks) -> int:
    """Steps after which the host reads a step's numbers: on a GPU they are there by then without waiting."""
    return 1 if ranks.device.type == "cuda" else 0


def evaluate(config: EvaluateConfig, ranks: Ranks) -> int:
    """Prints retrieval and zero-shot numbers of a model on one split of a data set."""
    quiet_libraries()
    splits = load_splits(config.data)
    split, samples = reported(splits, config.split)
    clip = load_model(config.model, seed=0)
    clip.model.to(ranks.device)
    trim = can_trim(clip.model, clip.tokenize)
    workers = num_workers(config.data.workers, ranks)
    measure = build_measure(config, config.data, clip, ranks, trim, workers)
    task = build_task(splits.name, samples, splits.classnames, splits.templates, clip.tokenize, splits.text_errors)
    evaluation = measure(task)
    if ranks.first:
        notes = splits.notes if split == "val" else []  # where val is a share of train, they say so
        print("\n".join(notes + clip.notes))
        gallery = {splits.name: {"split": split, **evaluation.gallery}}
        results = {"model": evaluation.metrics, "meta": {"gallery": gallery, "relevance": config.relevance}}
        print_results(results, sys.stdout)
        if config.out:
            replace_file(Path(config.out), json.dumps(results, indent=2) + "\n")
    return 0


def export(config: ExportConfig) -> int:
    """Writes the run's weights as an open_clip folder, after plain open_clip has loaded and repeated them."""
    quiet_libraries()
    folder = Path(config.run)
    out = Path(config.out) if config.out else folder / "export"
    trained = load_config(folder / "config.yaml", Config)
    clip = load_model(ModelConfig(name=config.run, pretrained=None, checkpoint=config.checkpoint), seed=0)
    splits = load_splits(trained.data)
    split, samples = reported(splits)
    whole = len(samples) <= MOST_EXPORT_CHECKS
    samples = samples.take(np.arange(min(len(samples), MOST_EXPORT_CHECKS)))
    ranks = Ranks(torch.device("cpu"), 0, 1, 1, "32-true")
    trim = can_trim(clip.model, clip.tokenize)
    measure = build_measure(trained.eval, trained.data, clip, ranks, trim, workers=0)
    task = build_task(splits.name, samples, splits.classnames, splits.templates, clip.tokenize, splits.text_errors)
    ours = measure(task)
    kept = task.images[ours.embedded.kept.numpy()].tolist()
    results = read_results(folder)

    def card(plain: Reloaded) -> str:
        theirs = judge(task, replace(ours.embedded, image=plain.image, text=plain.text), trained.eval.relevance)
        return card_text(
            name=trained.name or folder.name,
            base=trained.model.name,
            data=splits.name,
            split=split,
            galleries={name: size for name, size in ours.gallery.items() if name not in ("indexed", "used", "dropped")},
            before=results.get("base", {}) if whole else {},  # the base was measured on all of them
            exported=(results.get(config.checkpoint, {}) if whole else {}) | ours.metrics,
            plain=theirs.metrics,
            reloaded=plain,
            versions={"clipft": __version__, **plain.versions},
        )

    checked = export_folder(
        clip,
        out,
        files=[(samples.key(i), image_of(samples.read(i))) for i in kept],
        ours=ours.embedded.image,
        captions=task.texts,
        card=card,
    )
    print(f"{out}: {CONFIG_NAME}, {WEIGHTS_NAME}, README.md")
    print(
        f"Loaded again by plain open_clip: features agree to {checked.difference:.0e} on the same inputs, lowest cosine"
    )
    print(f"{checked.cosine.min():.4f} on {len(kept)} original files, {len(checked.causes)} below {MIN_COSINE}.")
    for cause, count in Counter(checked.causes.values()).items():
        print(f"  {count} files: {cause}")
    return 0


def num_workers(asked: int | None, ranks: Ranks) -> int:
    """Loader processes of this rank: all its cores but the one that trains."""
    return asked if asked is not None else min(MOST_WORKERS, ranks.cores() - 1)


def quiet_libraries() -> None:
    """Lightning's tips and its advice on loaders that are not ours to heed."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # 1x1 convolutions
