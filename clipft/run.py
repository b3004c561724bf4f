"""Where the parts meet: train, evaluate, export, each read from top to bottom."""

import json
import logging
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clipft import __version__
from clipft.capacity import check_disk, choose_micro_batch, num_workers
from clipft.config import Config, EvaluateConfig, Every, ExportConfig, ModelConfig, parse_every
from clipft.data.augment import build_augment
from clipft.data.order import largest_share
from clipft.data.sample import image_of
from clipft.data.split import load_splits
from clipft.data.waiting import Wait
from clipft.files import replace_file
from clipft.fit import Job, ending, fit, is_over, reached, set_bias, towers_of
from clipft.frozen import kept_features, make_features
from clipft.judge.evaluate import build_task, judge
from clipft.judge.samples import sample_retrievals
from clipft.judge.table import print_results
from clipft.learn.checkpoint import Found, clean, find_state, saved_steps
from clipft.learn.loggers import build_loggers, each_guarded, log_end
from clipft.learn.module import freeze_fixed
from clipft.learn.optimizer import check_trained_by, parameter_groups, trained_by
from clipft.learn.stop import STOPS, StopRequest
from clipft.measure import (
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
from clipft.model.build import Clip, description
from clipft.model.compiled import check_compile
from clipft.model.encode import can_trim
from clipft.model.load import add_bias, load_model, set_temperature
from clipft.model.reach import freeze_unreached
from clipft.model.sources import RUN_CONFIG, starts_random
from clipft.model.tune import freeze, lr_multipliers
from clipft.model.weights import load_exactly, read_checkpoint
from clipft.plan import Steps, check_batch_norm, count_steps, order_of, other_data, plan_lines, units_of
from clipft.ranks import Ranks, check_alike, first_to_all
from clipft.report import on_the_way
from clipft.rundir import load_config, log, read_results, write_results
from clipft.ship.card import card_text
from clipft.ship.folder import CONFIG_NAME, MIN_COSINE, WEIGHTS_NAME, Reloaded, check_out, export_folder

WAIT_FRAC = 0.9  # of the time that ranks wait for each other: the one that waits for a batch shall say so first
NO_SIZES = ("indexed", "used", "dropped", "examples")  # of a gallery
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
    trained = not starts_random(config.model)
    new_bias = config.loss.name == "siglip" and add_bias(clip, config.train.batch_size, keep_scale=trained)
    set_temperature(clip, config.loss.temperature)
    multipliers = lr_multipliers(clip.model, config.tune)
    freeze(clip.model, multipliers)
    freeze_fixed(clip.model, config.loss)
    freeze_unreached(clip)
    if config.train.compile:
        check_compile(clip, ranks.device)
    meta = describe_run(config, splits, order, steps, clip)
    if ranks.world > 1:  # the checksum reads all weights
        check_alike(facts(config, meta, clip.model))
    found = first_to_all(ranks, lambda: enter(config, folder, clip, multipliers, steps))
    check_same_data(config, folder, meta, found.step)
    clip.model.to(ranks.device)
    micro = choose_micro_batch(config, folder, ranks, clip, towers_of(clip))
    check_batch_norm(config, ranks.world, micro)
    trim = can_trim(clip.model, clip.tokenize)
    share = largest_share(config.train.batch_size, ranks.world)
    workers = num_workers(config.data.workers, ranks, clip, share, config.eval.batch_size)
    wait = Wait(WAIT_FRAC * config.trainer.dist_timeout_s, stop.wish)
    measure = build_measure(config.eval, config.data, clip, ranks, trim, workers, wait)
    augment = build_augment(config.data, clip.preprocess_cfg)
    job = Job(config, folder, units, order, steps, measure, augment, multipliers, micro, meta)
    if new_bias and trained and not found.step:
        clip.notes.append(set_bias(job))
    over = is_over(config, steps, found)
    job = job if over else replace(job, kept=kept_features(job, found.path))
    validate = validation(splits, measure, config.eval.select)
    others, missing = other_data(config)
    clip.notes += missing
    tasks = report_tasks(splits, others, clip)
    plan = plan_lines(config, splits, order, steps, clip, ranks, multipliers, trim, micro, found.step)
    if ranks.first:
        replace_file(folder / RUN_CONFIG, json.dumps(description(clip), indent=2) + "\n")
        say = "\n".join([*found.notes, *plan])
        print(say, flush=True)
        log(folder, say)
        write_results(folder, read_results(folder) | {"meta": meta})
    loggers = build_loggers(config, folder) if ranks.first else []
    if config.eval.base and first_to_all(ranks, lambda: "base" not in read_results(folder)):
        record(folder, ranks, "base", [(split, measure(task)) for split, task in tasks], meta)
    if not over:
        make_features(job, stop)
    if not over and fit(job, validate, found, loggers, stop):
        if ranks.first:
            write_results(folder, read_results(folder) | {"meta": meta | reached(job)})
        return STOPS[stop.agreed]
    meta |= ending(job)
    evaluations = []
    for name in ("last", "best"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        load_exactly(clip.model, read_checkpoint(path), path)
        with on_the_way():
            evaluations = [(split, measure(task)) for split, task in tasks]
        record(folder, ranks, name, evaluations, meta)
    if ranks.first:
        results = finish(folder, reached(job))
        retrieved = sample_retrievals(tasks[0][1], evaluations[0][1].embedded) if loggers else []
        each_guarded(loggers, lambda logger: log_end(logger, results, retrieved))
    return 0


def enter(config: Config, folder: Path, clip: Clip, multipliers: dict[str, float], steps: Steps) -> Found:
    """Cleans up after a kill, finds the state to go on from, looks whether it fits and for room on the disk."""
    clean(folder)
    clean(folder / "checkpoints")
    found = find_state(folder / "checkpoints", clip.model)
    if is_over(config, steps, found):  # nothing more will be saved
        return found
    if found.said:
        now = trained_by(config.optim, parameter_groups(clip.model, config.optim, multipliers))
        check_trained_by(folder, found.said["trained_by"], now)
    there = len(saved_steps(folder / "checkpoints"))
    return replace(found, notes=[*found.notes, *check_disk(config, folder, clip, there)])


def evaluate(config: EvaluateConfig, ranks: Ranks) -> int:
    """Prints retrieval and zero-shot numbers of a model on one split of a data set."""
    quiet_libraries()
    splits = load_splits(config.data)
    split, samples = reported(splits, config.split)
    clip = load_model(config.model, seed=0)
    clip.model.to(ranks.device)
    trim = can_trim(clip.model, clip.tokenize)
    workers = num_workers(config.data.workers, ranks, clip, 0, config.batch_size)
    wait = Wait(WAIT_FRAC * config.trainer.dist_timeout_s)
    measure = build_measure(config, config.data, clip, ranks, trim, workers, wait)
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
    check_out(out)
    trained = load_config(folder / "config.yaml", Config)
    here = f"local-dir:{config.run}"  # a run may be called as an architecture is
    clip = load_model(ModelConfig(name=here, pretrained=None, checkpoint=config.checkpoint), seed=0)
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
            galleries={name: size for name, size in ours.gallery.items() if name not in NO_SIZES},
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
    print("\n".join(clip.notes))
    print(f"{out}: {CONFIG_NAME}, {WEIGHTS_NAME}, README.md")
    print(
        f"Loaded again by plain open_clip: features agree to {checked.difference:.0e} on the same inputs, lowest cosine"
    )
    print(f"{checked.cosine.min():.4f} on {len(kept)} original files, {len(checked.causes)} below {MIN_COSINE}.")
    for cause, count in Counter(checked.causes.values()).items():
        print(f"  {count} files: {cause}")
    return 0


def quiet_libraries() -> None:
    """Lightning's tips and its advice on loaders that are not ours to heed."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # 1x1 convolutions
