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
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from clipft import __version__
from clipft.config import Config, EvaluateConfig, Every, ExportConfig, ModelConfig, parse_every
from clipft.data.augment import Augment, build_augment
from clipft.data.loader import Batch, train_loader
from clipft.data.sample import image_of
from clipft.data.split import Splits, load_splits
from clipft.judge.evaluate import build_task, judge
from clipft.judge.samples import sample_retrievals
from clipft.judge.table import print_results
from clipft.learn.after_step import AfterStep, Validate
from clipft.learn.checkpoint import AtomicCheckpointIO, saved_step
from clipft.learn.journal import Journal
from clipft.learn.loggers import build_loggers, each_guarded, log_end
from clipft.learn.metrics_file import MetricsFile
from clipft.learn.module import ContrastiveModule, Plan, freeze_unused
from clipft.learn.stop import Timer
from clipft.measure import (
    Measure,
    check_same_data,
    describe_run,
    finish,
    record,
    report_tasks,
    reported,
    validation,
)
from clipft.model.encode import can_trim, encode_image, encode_text, to_float, trim_tokens
from clipft.model.load import RUN_CONFIG, Clip, description, load_model
from clipft.model.weights import load_exactly, read_checkpoint
from clipft.plan import Steps, count_steps, plan_lines
from clipft.ranks import Ranks
from clipft.rundir import load_config, log, read_results, write_results, write_text
from clipft.ship.card import card_text
from clipft.ship.folder import CONFIG_NAME, MIN_COSINE, WEIGHTS_NAME, Reloaded, export_folder

MOST_WORKERS = 8
MOST_EXPORT_CHECKS = 2000  # images that plain open_clip encodes again


def train(config: Config, folder: Path, ranks: Ranks) -> int:
    """Fine-tunes from where the run's folder stands, with the base measured first; returns the exit code."""
    quiet_libraries()
    splits = load_splits(config.data)
    steps = count_steps(config, splits)
    clip = load_model(config.model, config.train.seed)
    freeze_unused(clip.model)
    clip.model.to(ranks.device)
    trim = can_trim(clip.model, clip.tokenize)
    workers = num_workers(config.data.workers, ranks)
    measure = Measure(clip, ranks, trim, config.eval.relevance, config.eval.batch_size, workers, config.data.max_pixels)
    job = Job(config, folder, splits, steps, measure, build_augment(config.data, clip.preprocess_cfg))
    validate = validation(splits, measure, config.eval.select)
    tasks = report_tasks(config, splits, clip)
    done = saved_step(folder / "checkpoints" / "last.ckpt")
    meta = describe_run(config, splits, steps, clip)
    check_same_data(config, folder, meta, done)
    if ranks.first:
        write_text(folder / RUN_CONFIG, json.dumps(description(clip), indent=2) + "\n")
        plan = "\n".join(plan_lines(config, splits, steps, clip, ranks, trim, done))
        print(plan, flush=True)
        log(folder, plan)
        write_results(folder, read_results(folder) | {"meta": meta})
    loggers = build_loggers(config, folder) if ranks.first else []
    if config.eval.base and "base" not in read_results(folder):
        record(folder, ranks, "base", [(split, measure(task)) for split, task in tasks], meta)
    if done < steps.total:
        stopped = fit(job, validate, done, loggers)
        if stopped:
            return 128 + stopped
    evaluations = []
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        load_exactly(clip.model, read_checkpoint(path), path)
        evaluations = [(split, measure(task)) for split, task in tasks]
        record(folder, ranks, name, evaluations, meta)
    if ranks.first:
        results = finish(folder)
        found = sample_retrievals(tasks[0][1], evaluations[0][1].embedded) if loggers else []
        each_guarded(loggers, lambda logger: log_end(logger, results, found))
    return 0


@dataclass(frozen=True)
class Job:
    """What does not change in a run."""

    config: Config
    folder: Path
    splits: Splits
    steps: Steps
    measure: Measure
    augment: Augment


def fit(job: Job, validate: Validate, done: int, loggers: list[Logger]) -> int:
    """Trains from step `done`; returns the signal that stopped it, or 0."""
    config, folder, splits, steps = job.config, job.folder, job.splits, job.steps
    measure, clip, ranks = job.measure, job.measure.clip, job.measure.ranks
    assert splits.train is not None and config.optim.lr is not None
    plan = Plan(
        num_steps=steps.total,
        warmup_steps=steps.warmup,
        batch_size=config.train.batch_size,
        micro_batch=config.train.micro_batch or config.train.batch_size,
        lr=config.optim.lr,
        seed=config.train.seed,
    )
    loader = train_loader(
        splits.train,
        augment=job.augment,
        tokenize=tokenizer(clip, measure.trim),
        max_pixels=config.data.max_pixels,
        positives=config.loss.positives,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        num_steps=steps.total,
        rank=ranks.rank,
        world=ranks.world,
        start_step=done,
        workers=measure.workers,
        pin=ranks.device.type == "cuda",
    )
    journal = Journal(
        MetricsFile(folder / "metrics.csv", done) if ranks.first else None,
        loggers,
        partial(log, folder),
        batch_size=config.train.batch_size,
        num_steps=steps.total,
        first_step=done,
    )
    after = AfterStep(
        folder / "checkpoints",
        journal,
        save=Timer(parse_every("checkpoint.every", config.checkpoint.every) or Every()),
        evaluate=Timer(parse_every("eval.every", config.eval.every) or Every(steps=steps.per_epoch)),
        validate=validate,
        validate_first=config.eval.base and not done,
        select=config.eval.select,
        keep=config.checkpoint.keep,
        max_bad_frac=config.data.max_bad_frac,
        lag=host_lag(ranks),
    )
    module = ContrastiveModule(clip.model, encoder(clip), config.optim, plan)
    trainer = build_trainer(ranks, config.trainer.precision, after)
    trainer.fit(module, loader, ckpt_path=folder / "checkpoints" / "last.ckpt" if done else None, weights_only=True)
    if after.stop.agreed:
        journal.print(f"Stopped at step {module.step} of {steps.total}, saved. The same command goes on from there.")
    return after.stop.agreed


def build_trainer(ranks: Ranks, precision: str | None, after: AfterStep) -> pl.Trainer:
    """Lightning's Trainer for one pass over the loader, whose length is the whole run."""
    several = ranks.world > 1
    # Our process group stands already; Lightning joins it. Gradients live in DDP's buckets, not beside them.
    strategy = DDPStrategy(gradient_as_bucket_view=True) if several else "auto"
    plugins: list[Any] = [AtomicCheckpointIO(), *([TorchElasticEnvironment()] if several else [])]
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(ranks.device.type, ranks.device.type),
        devices=ranks.local_world if several else 1,
        num_nodes=ranks.world // ranks.local_world,
        strategy=strategy,
        precision=precision or ranks.precision,  # pyright: ignore[reportArgumentType]
        plugins=plugins,
        callbacks=[after],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


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
    measure = Measure(clip, ranks, trim, config.relevance, config.batch_size, workers, config.data.max_pixels)
    task = build_task(splits.name, samples, splits.classnames, splits.templates, clip.tokenize)
    evaluation = measure(task)
    if ranks.first:
        notes = splits.notes if split == "val" else []  # where val is a share of train, they say so
        print("\n".join(notes + clip.notes))
        gallery = {splits.name: {"split": split, **evaluation.gallery}}
        results = {"model": evaluation.metrics, "meta": {"gallery": gallery, "relevance": config.relevance}}
        print_results(results, sys.stdout)
        if config.out:
            write_text(Path(config.out), json.dumps(results, indent=2) + "\n")
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
    measure = Measure(clip, ranks, trim, trained.eval.relevance, trained.eval.batch_size, 0, trained.data.max_pixels)
    task = build_task(splits.name, samples, splits.classnames, splits.templates, clip.tokenize)
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
            galleries={name: size for name, size in ours.gallery.items() if isinstance(size, int)},
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
