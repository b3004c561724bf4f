"""Samples to batches: one request is one global step, its answer this rank's slice of that step."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipft.data.augment import Augment, apply_augment
from clipft.data.caption import caption_id, captions_of, group_id, group_of, hash_id
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples
from clipft.data.order import batch_at, rank_slice, rng_for
from clipft.data.pairs import Units
from clipft.data.sample import IMAGE_KINDS, BadSample, image_of

CAPTION_STREAM, AUGMENT_STREAM = 0, 1  # last part of the random key, beside seed, epoch and unit
PREFETCH = 2  # steps that a worker prepares ahead
READ = (*IMAGE_KINDS, "json", "txt")

Tokenize = Callable[[list[str]], Int64[Tensor, "b L"]]


@dataclass
class Batch:
    """A rank's slice of a global batch. A sample that could not be used keeps its row, with valid False."""

    pixels: UInt8[Tensor, "b S S 3"]
    tokens: Int64[Tensor, "b L"]
    valid: Bool[Tensor, " b"]
    ids: Int64[Tensor, " b"]
    """Rows of equal ids are positives of each other; 0 or more where valid, negative and unique elsewhere."""
    keys: list[str]
    dropped: dict[str, int]
    """Reason -> number of rows that are not valid."""
    bad: dict[str, str] = field(default_factory=dict)
    """Key -> reason of these rows."""

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory (DataLoader calls this)."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device; from page-locked memory the copy runs beside the computation."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, rows: int) -> list["Batch"]:
        """The batch in pieces of so many rows, the last one smaller where it does not come out even."""
        return [self._rows(slice(start, start + rows)) for start in range(0, len(self.keys), rows)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("pixels", "tokens", "valid", "ids")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def _rows(self, rows: slice) -> "Batch":
        keys = self.keys[rows]
        bad = {key: self.bad[key] for key in keys if key in self.bad}
        piece = self._each(lambda tensor: tensor[rows])
        return replace(piece, keys=keys, bad=bad, dropped=dict(Counter(bad.values())))


class Steps(Sampler[int]):
    """Global steps from `start` on. The length is that of the whole run, which is how Lightning counts."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


@dataclass
class TrainSteps(Dataset[Batch]):
    """Item s is this rank's slice of global step s, a pure function of s."""

    units: Units
    augment: Augment
    tokenize: Tokenize
    max_pixels: int
    positives: str
    group: str | None
    seed: int
    batch_size: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch:
        epoch, units = batch_at(self.seed, step, len(self.units), self.batch_size)
        units = units[rank_slice(self.batch_size, self.rank, self.world)]
        side = self.augment.size
        pixels = torch.zeros(len(units), side, side, 3, dtype=torch.uint8)
        captions = [""] * len(units)
        ids = -1 - torch.from_numpy(units)
        keys = [self.units.key(u) for u in units.tolist()]
        bad: dict[int, str] = {}
        for row, u in enumerate(units.tolist()):
            try:
                pixels[row], captions[row], ids[row] = self.load(epoch, u)
            except BadSample as error:
                bad[row] = error.reason
        valid = torch.tensor([row not in bad for row in range(len(units))])
        return Batch(
            pixels=pixels,
            tokens=self.tokenize(captions).long(),
            valid=valid,
            ids=ids,
            keys=keys,
            dropped=dict(Counter(bad.values())),
            bad={keys[row]: reason for row, reason in bad.items()},
        )

    def load(self, epoch: int, u: int) -> tuple[UInt8[Tensor, "S S 3"], str, int]:
        """Augmented pixels, the caption and the id."""
        i, number = self.units.at(u)
        members = self.units.samples.read(i, READ)
        captions = captions_of(members)
        if number is None:
            number = int(rng_for(self.seed, epoch, u, CAPTION_STREAM).integers(len(captions)))
        if number >= len(captions):
            raise BadSample("no_caption")
        caption = captions[number]
        found = self.id_of(u, members, caption)
        pixels = decode_rgb(image_of(members), self.max_pixels)
        return apply_augment(self.augment, pixels, rng_for(self.seed, epoch, u, AUGMENT_STREAM)), caption, found

    def id_of(self, u: int, members: dict[str, bytes], caption: str) -> int:
        """What rows that belong together share, by `loss.positives`; a sample without group stands alone."""
        if self.positives == "caption":
            return caption_id(caption)
        if self.positives == "image":
            return hash_id(image_of(members))
        if self.positives == "group":
            assert self.group is not None
            group = group_of(members, self.group)
            return self.units.at(u)[0] if group is None else group_id(group)
        return u


def train_loader(
    units: Units,
    *,
    augment: Augment,
    tokenize: Tokenize,
    max_pixels: int,
    positives: str,
    group: str | None,
    seed: int,
    batch_size: int,
    num_steps: int,
    rank: int,
    world: int,
    start_step: int,
    workers: int,
    pin: bool,
) -> DataLoader[Batch]:
    """This rank's slices of the global steps start_step to num_steps - 1, in order; len() is num_steps."""
    batch_at(seed, 0, len(units), batch_size)  # raises for a batch that the units or ranks cannot fill,
    rank_slice(batch_size, rank, world)  # before any process starts
    dataset = TrainSteps(units, augment, tokenize, max_pixels, positives, group, seed, batch_size, rank, world)
    return in_order(dataset, Steps(start_step, num_steps), workers, pin)


@dataclass
class EvalBatches(Dataset[tuple]):
    """Item n is batch n: sample indices, pixels through `preprocess`, and which rows hold a sample."""

    samples: Samples
    preprocess: Callable[[Image.Image], Tensor]
    max_pixels: int
    batches: list[np.ndarray]

    def __getitem__(self, n: int) -> tuple[Int64[np.ndarray, " b"], Float[Tensor, "b 3 S S"], Bool[Tensor, " b"]]:
        indices = self.batches[n]
        images = [self.load(int(i)) for i in indices]
        blank = torch.zeros_like(self.preprocess(Image.new("RGB", (64, 64))))
        pixels = torch.stack([blank if image is None else image for image in images])
        return indices, pixels, torch.tensor([image is not None for image in images])

    def load(self, i: int) -> Tensor | None:
        try:
            raw = image_of(self.samples.read(i, IMAGE_KINDS))
            return self.preprocess(Image.fromarray(decode_rgb(raw, self.max_pixels)))
        except BadSample:
            return None  # its row comes back with valid False, for the evaluation to count


def eval_images(
    samples: Samples,
    preprocess: Callable[[Image.Image], Tensor],
    max_pixels: int,
    workers: int,
    batches: list[np.ndarray],
) -> DataLoader[tuple]:
    """(sample indices, pixels, valid) of each of the batches of sample indices, in order."""
    return in_order(EvalBatches(samples, preprocess, max_pixels, batches), Steps(0, len(batches)), workers, False)


def in_order(dataset: Dataset, steps: Steps, workers: int, pin: bool) -> DataLoader:
    """The items of these steps, each built whole by one process, in the order of the steps."""
    return DataLoader(
        dataset,
        sampler=steps,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=outlive_stop_signals if workers else None,
        # By fork the workers share the index's memory and start in milliseconds.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def as_it_is(item: Any) -> Any:
    return item


def outlive_stop_signals(_: int) -> None:
    """Lets a worker go on when a stop signal goes to all processes: the last step still needs its batches.

    Only SIGTERM from the training process itself ends it; that is how multiprocessing cleans up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=exit_when_parent_asks, daemon=True).start()


def exit_when_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
