"""Samples to batches: one request is one global step, its answer this rank's slice of that step."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from clipft.data.augment import Augment, apply_augment
from clipft.data.caption import caption_id, group_id, group_of, hash_id, written_captions
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples
from clipft.data.kept import Kept
from clipft.data.order import Order, rank_slice, rng_for
from clipft.data.pairs import Units, caption_at
from clipft.data.remote.ahead import Ahead
from clipft.data.sample import CAPTION_KINDS, IMAGE_KINDS, BadSample, failing_at, image_of
from clipft.data.waiting import NOTHING, InFlight, Wait, WaitingLoader, in_order

CAPTION_STREAM, AUGMENT_STREAM = 0, 1  # last part of the random key, beside seed, epoch and unit
READ = (*IMAGE_KINDS, *CAPTION_KINDS)
MOST_AHEAD = 2  # loader processes of a rank that download before shards are needed
WAIT = Wait()
NONE_KEPT: Mapping[str, Kept] = {}

Tokenize = Callable[[list[str]], Int64[Tensor, "b L"]]


@dataclass
class Batch:
    """A rank's slice of a global batch. A sample that could not be used keeps its row, with valid False."""

    pixels: UInt8[Tensor, "b 3 S S"]
    tokens: Int64[Tensor, "b L"]
    valid: Bool[Tensor, " b"]
    ids: Int64[Tensor, " b"]
    """Rows of equal ids are positives of each other; 0 or more where valid, negative and unique elsewhere."""
    keys: list[str]
    bad: dict[int, str]
    """Row that is not valid -> reason."""
    image: Float[Tensor, "b D"] | None = None
    """Unit features, where they are kept and not made from pixels, which have no extent then."""
    text: Float[Tensor, "b D"] | None = None
    """Likewise, in place of tokens."""

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
        if rows >= len(self):
            return [self]
        return [self._rows(slice(start, start + rows)) for start in range(0, len(self), rows)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})

    def _rows(self, rows: slice) -> "Batch":
        bad = {row - rows.start: reason for row, reason in self.bad.items() if rows.start <= row < rows.stop}
        return replace(self._each(lambda tensor: tensor[rows]), keys=self.keys[rows], bad=bad)


class Steps(Sampler[int]):
    """Global steps from `start` on. The length is that of the whole run, which is how Lightning counts."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


@dataclass(frozen=True)
class Loaded:
    """A pair as a batch takes it."""

    pixels: UInt8[Tensor, "3 S S"] | None
    """Augmented; None where the image's feature is kept."""
    caption: str
    id: int
    features: dict[str, Float32[np.ndarray, " D"]]
    """Those that are kept, by tower."""


@dataclass
class TrainSteps(Dataset[Batch]):
    """Item s is this rank's slice of global step s, a pure function of s."""

    units: Units
    augment: Augment
    tokenize: Tokenize
    max_pixels: int
    positives: str
    group: str | None
    text_errors: str
    seed: int
    order: Order
    rank: int
    world: int
    in_flight: InFlight
    kept: Mapping[str, Kept]
    """Features of locked towers, by tower."""
    ahead: Ahead | None
    """Brings shards that lie elsewhere before they are read."""

    def __getitem__(self, step: int) -> Batch:
        info = get_worker_info()
        if self.ahead and (info is None or info.id < MOST_AHEAD):
            self.ahead.at(step)
        epochs, units = self.order.batch(step)
        mine = rank_slice(len(units), self.rank, self.world)
        epochs, units = epochs[mine], units[mine]
        side = 0 if "image" in self.kept else self.augment.size
        pixels = torch.zeros(len(units), 3, side, side, dtype=torch.uint8)
        features = {tower: torch.zeros(len(units), kept.width) for tower, kept in self.kept.items()}
        captions = [""] * len(units)
        ids = -1 - torch.from_numpy(units)
        keys = [self.units.key(u) for u in units.tolist()]
        bad: dict[int, str] = {}
        for row, (epoch, u) in enumerate(zip(epochs.tolist(), units.tolist(), strict=True)):
            self.in_flight.note(u)
            try:
                with failing_at(lambda u=u: self.key(u)):
                    found = self.load(epoch, u)
            except BadSample as error:
                bad[row] = error.reason
                continue
            captions[row], ids[row] = found.caption, found.id
            for tower, feature in found.features.items():
                features[tower][row] = torch.from_numpy(feature.copy())  # torch warns of memory that it must not write
            if found.pixels is not None:
                pixels[row] = found.pixels
        self.in_flight.note(NOTHING)
        valid = torch.tensor([row not in bad for row in range(len(units))])
        return Batch(
            pixels=pixels,
            tokens=torch.zeros(len(units), 0).long() if "text" in self.kept else self.tokenize(captions).long(),
            valid=valid,
            ids=ids,
            keys=keys,
            bad=bad,
            **features,
        )

    def key(self, u: int) -> str:
        return self.units.key(u)

    def load(self, epoch: int, u: int) -> Loaded:
        i, number = self.units.at(u)
        needs_image = "image" not in self.kept or self.positives == "image"
        members = self.units.samples.read(i, READ if needs_image else CAPTION_KINDS)
        captions = written_captions(members, self.text_errors)
        if number is None:
            number = int(rng_for(self.seed, epoch, u, CAPTION_STREAM).integers(len(captions)))
        caption = caption_at(captions, number)
        found = self.id_of(u, members, caption)
        features = {tower: kept.feature(i, number) for tower, kept in self.kept.items()}
        if "image" in self.kept:
            return Loaded(None, caption, found, features)
        pixels = decode_rgb(image_of(members), self.max_pixels)
        pixels = apply_augment(self.augment, pixels, rng_for(self.seed, epoch, u, AUGMENT_STREAM))
        return Loaded(pixels, caption, found, features)

    def id_of(self, u: int, members: dict[str, bytes], caption: str) -> int:
        """What rows that belong together share, by `loss.positives`; a sample without group stands alone."""
        if self.positives == "caption":
            return caption_id(caption)
        if self.positives == "image":
            return hash_id(image_of(members))
        if self.positives == "group":
            assert self.group is not None
            group = group_of(members, self.group, self.text_errors)
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
    text_errors: str,
    seed: int,
    order: Order,
    num_steps: int,
    rank: int,
    world: int,
    start_step: int,
    workers: int,
    pin: bool,
    wait: Wait = WAIT,
    kept: Mapping[str, Kept] = NONE_KEPT,
) -> WaitingLoader:
    """This rank's slices of the global steps start_step to num_steps - 1, in order; len() is num_steps."""
    rank_slice(len(order.batch(start_step)[1]), rank, world)  # raises for a batch that the units or ranks cannot fill
    in_flight = InFlight(workers)
    units = replace(units, samples=telling(units.samples, in_flight))
    remote = units.samples.remote
    dataset = TrainSteps(
        units=units,
        augment=augment,
        tokenize=tokenize,
        max_pixels=max_pixels,
        positives=positives,
        group=group,
        text_errors=text_errors,
        seed=seed,
        order=order,
        rank=rank,
        world=world,
        in_flight=in_flight,
        kept=kept,
        ahead=Ahead(remote, units.samples.shards, order, rank, world) if remote else None,
    )
    steps = Steps(start_step, num_steps)
    return in_order(dataset, steps, dataset.in_flight, dataset.key, wait, workers, pin)


def telling(samples: Samples, in_flight: InFlight) -> Samples:
    """The samples, whose downloads count as progress of the loader process that waits for them."""
    if samples.remote is None:
        return samples
    cache = replace(samples.remote.cache, beat=in_flight.beat)
    return replace(samples, remote=replace(samples.remote, cache=cache))


@dataclass
class EvalBatches(Dataset[tuple]):
    """Item n is batch n: sample indices, pixels through `preprocess`, and which rows hold a sample."""

    samples: Samples
    preprocess: Callable[[Image.Image], Tensor]
    max_pixels: int
    batches: list[np.ndarray]
    in_flight: InFlight

    def __getitem__(self, n: int) -> tuple[Int64[np.ndarray, " b"], Float[Tensor, "b 3 S S"], Bool[Tensor, " b"]]:
        indices = self.batches[n]
        images = [self.load(int(i)) for i in indices]
        self.in_flight.note(NOTHING)
        blank = torch.zeros_like(self.preprocess(Image.new("RGB", (64, 64))))
        pixels = torch.stack([blank if image is None else image for image in images])
        return indices, pixels, torch.tensor([image is not None for image in images])

    def key(self, i: int) -> str:
        return self.samples.key(i)

    def load(self, i: int) -> Tensor | None:
        self.in_flight.note(i)
        try:
            with failing_at(lambda: self.key(i)):
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
    wait: Wait = WAIT,
) -> WaitingLoader:
    """(sample indices, pixels, valid) of each of the batches of sample indices, in order."""
    in_flight = InFlight(workers)
    dataset = EvalBatches(telling(samples, in_flight), preprocess, max_pixels, batches, in_flight)
    steps = Steps(0, len(batches))
    return in_order(dataset, steps, dataset.in_flight, dataset.key, wait, workers, False)
