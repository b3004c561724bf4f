"""Whole sets of real pictures, read to the last sample: CLIPFT_REAL_DATA names a folder of packed sets."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from clipft.config import DataConfig, VerifyConfig
from clipft.data.augment import Augment
from clipft.data.caption import read_label
from clipft.data.index import Samples
from clipft.data.loader import Batch, eval_images, train_loader
from clipft.data.order import Shuffle, permutation
from clipft.data.pairs import build_units
from clipft.data.sample import BadSample
from clipft.data.split import Splits, load_splits
from clipft.data.verify import all_shards, summed, verify
from clipft.learn.ledger import Ledger, account, bad_counts

ROOT = Path(os.environ.get("CLIPFT_REAL_DATA", "nowhere"))
SETS = sorted(path.parent.name for path in ROOT.glob("*/shards.json"))
BATCH, MAX_PIXELS, SEED = 64, 64_000_000, 3
SMALL = Augment(16, 0.9, 0.0, 0.0, "bicubic", "shortest", (0, 0, 0))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SETS, reason="CLIPFT_REAL_DATA names no packed sets")]


class Read(NamedTuple):
    """What became of the samples of a split: indexed = used + dropped + remainder."""

    keys: list[str]
    used: int
    dropped: dict[str, int]
    remainder: int


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text)] for text in texts])


def trained(samples: Samples, world: int) -> Read:
    """One epoch through the training loaders of all ranks, with the ledger of a run."""
    units = build_units(samples, "one")
    order = Shuffle(SEED, len(units), BATCH)
    loaders = [
        train_loader(
            units,
            augment=SMALL,
            tokenize=tokenize,
            max_pixels=MAX_PIXELS,
            positives="caption",
            group=None,
            text_errors="strict",
            seed=SEED,
            order=order,
            num_steps=order.per_epoch,
            rank=rank,
            world=world,
            start_step=0,
            workers=1,
            pin=False,
        )
        for rank in range(world)
    ]
    ledger, keys = Ledger(1.0, order.per_epoch * BATCH, "this"), []
    for step in zip(*loaders, strict=True):
        assert all(bool(text) for batch in step for text in batch.tokens[batch.valid])
        keys += [key for batch in step for key in batch.keys]
        seen = [bad_counts(batch) for batch in step]
        sums = [sum(num_bad for num_bad, *_ in seen), *(n for _, *runs in seen for n in runs)]
        ledger.add([len(batch) for batch in step], sum(int(batch.valid.sum()) for batch in step), sums, bad_of(step))
    ledger.meet()
    steps = {"num_units": len(units), "per_epoch": order.per_epoch, "batch_size": BATCH, "step": order.per_epoch}
    counts = account(ledger.state_dict(), **steps, incomplete=samples.dropped, examples=samples.examples)
    assert counts["indexed"] == len(samples) + sum(samples.dropped.values()) and counts["not_reached"] == 0
    rest = [units.key(u) for u in permutation(SEED, 0, len(units))[order.per_epoch * BATCH :].tolist()]
    assert len(rest) == counts["left_out"]
    assert sorted(keys + rest) == sorted(samples.key(i) for i in range(len(samples)))
    return Read(keys, counts["used"], counts["dropped"], counts["left_out"])


def bad_of(step: tuple[Batch, ...]) -> list[tuple[str, str]]:
    return [(batch.keys[row], reason) for batch in step for row, reason in batch.bad.items()]


def evaluated(samples: Samples, world: int) -> Read:
    """All samples through the evaluation loaders of all ranks, which leave nothing out, and their labels."""
    batches = np.array_split(np.arange(len(samples)), -(-len(samples) // BATCH))
    keys, used, dropped = [], 0, Counter()
    for rank in range(world):
        loader = eval_images(samples, small, MAX_PIXELS, 1, batches[rank::world])
        for indices, _, valid in loader:
            keys += [samples.key(i) for i in indices.tolist()]
            for i, whole in zip(indices.tolist(), valid.tolist(), strict=True):
                reason = None if whole else "image"
                try:
                    read_label(samples.read(i, ("cls",))["cls"])
                except BadSample as bad:
                    reason = reason or bad.reason
                used, dropped = used + (reason is None), dropped + Counter(filter(None, [reason]))
    assert sorted(keys) == sorted(samples.key(i) for i in range(len(samples)))
    return Read(keys, used, dict(dropped), 0)


def small(image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1).float()


def read_set(name: str, world: int) -> dict[str, Read]:
    """Each split through the loader that fits it: training for captions, evaluation for labels alone."""
    splits = load_set(name)
    parts = {split: getattr(splits, split) for split in ("train", "val", "test")}
    return {
        split: (trained if "txt" in samples.kinds else evaluated)(samples, world)
        for split, samples in parts.items()
        if samples is not None
    }


def load_set(name: str) -> Splits:
    return load_splits(DataConfig(path=str(ROOT / name)))


@pytest.mark.parametrize("name", SETS)
def test_every_sample_is_used_dropped_or_left_out_on_one_and_on_two_ranks(name: str):
    one, two = read_set(name, 1), read_set(name, 2)
    assert one.keys() == two.keys()
    for split, read in one.items():
        samples = getattr(load_set(name), split)
        assert len(samples) == read.used + sum(read.dropped.values()) + read.remainder
        assert sorted(two[split].keys) == sorted(read.keys)
        assert two[split][1:] == read[1:]
        if "txt" in samples.kinds:  # the slices of a step in the order of the ranks are the step
            assert two[split].keys == read.keys


@pytest.mark.parametrize("name", SETS)
def test_a_packed_set_is_as_it_was_written(name: str):
    report = verify(VerifyConfig(data=DataConfig(path=str(ROOT / name))))
    shards = all_shards(report)
    assert report.num_listed == len(shards) and not any(each.problems for each in shards)
    assert all(each.indexed == each.fine + sum(each.dropped.values()) for each in shards)
    assert summed(shards)["fine"] == summed(shards)["indexed"]
