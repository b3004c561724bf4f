"""One side of the pairs alone, each image or caption once: what a locked tower is shown before training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from clipft.data.augment import Augment, apply_augment
from clipft.data.caption import written_captions
from clipft.data.decode import decode_rgb
from clipft.data.loader import Steps, Tokenize, telling
from clipft.data.order import rng_for
from clipft.data.pairs import Units, caption_at
from clipft.data.sample import CAPTION_KINDS, IMAGE_KINDS, BadSample, failing_at, image_of
from clipft.data.waiting import NOTHING, InFlight, Wait, WaitingLoader, in_order


@dataclass(frozen=True)
class Side:
    """How a unit becomes a row of a tower's input."""

    units: Units
    load: Callable[[Units, int], Any]
    """What there is of one of the units; raises BadSample."""
    blank: Any
    """Stands in the place of what there is not."""
    join: Callable[[list[Any]], Tensor]


@dataclass
class SideBatches(Dataset[tuple[Tensor, list[str]]]):
    """Item n is batch n: always `size` rows of input, the last ones blank, and of each unit why it is not there."""

    side: Side
    batches: list[range]
    size: int
    in_flight: InFlight

    def __getitem__(self, n: int) -> tuple[Tensor, list[str]]:
        units = self.batches[n]
        inputs, reasons = [self.side.blank] * self.size, [""] * len(units)
        for row, u in enumerate(units):
            self.in_flight.note(u)
            try:
                with failing_at(lambda u=u: self.side.units.key(u)):
                    inputs[row] = self.side.load(self.side.units, u)
            except BadSample as bad:
                reasons[row] = bad.reason
        self.in_flight.note(NOTHING)
        return self.side.join(inputs), reasons


def side_batches(side: Side, batches: list[range], size: int, workers: int, wait: Wait) -> WaitingLoader:
    """Inputs and reasons of each of the batches of units, in order."""
    in_flight = InFlight(workers)
    side = replace(side, units=replace(side.units, samples=telling(side.units.samples, in_flight)))
    dataset = SideBatches(side, batches, size, in_flight)
    steps = Steps(0, len(batches))
    return in_order(dataset, steps, in_flight, side.units.key, wait, workers, False)


def images_of(images: Units, augment: Augment, max_pixels: int) -> Side:
    """The images as training sees them where nothing is drawn at random."""

    def load(units: Units, i: int) -> UInt8[Tensor, "3 S S"]:
        pixels = decode_rgb(image_of(units.samples.read(i, IMAGE_KINDS)), max_pixels)
        return apply_augment(augment, pixels, rng_for(0))

    blank = torch.zeros(3, augment.size, augment.size, dtype=torch.uint8)
    return Side(images, load, blank, torch.stack)


def texts_of(pairs: Units, tokenize: Tokenize, text_errors: str) -> Side:
    """The captions of all pairs of image and caption."""

    def load(units: Units, u: int) -> str:
        i, number = units.at(u)
        assert number is not None
        return caption_at(written_captions(units.samples.read(i, CAPTION_KINDS), text_errors), number)

    return Side(pairs, load, "", lambda captions: tokenize(captions).long())
