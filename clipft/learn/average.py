"""The exponential moving average of what is trained, beside the weights that go on being trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """a <- a + (1 - decay) (w - a) after each step, over the trained parameters, by their names in the model.

    Lightning's EMAWeightAveraging is not used: it counts optimizer.step(), so that a step that is left out would move
    the average; its decay * a + (1 - decay) * w moves what is frozen by rounding; it copies frozen towers too, asks a
    GPU for a number at each step, and its part of a saved state is written before and replaced by the module's own.
    """

    def __init__(self, model: nn.Module, decay: float, with_buffers: bool, start: Mapping[str, Tensor]):
        """`start` are the averages to go on from; what is not among them starts at its present value."""
        self.decay = decay
        self.current = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if with_buffers:  # the statistics of BatchNorm, where they are trained
            self.current |= {name: value for name, value in model.named_buffers() if value.is_floating_point()}
        self.values = {
            name: start.get(name, value).detach().to(value, copy=True) for name, value in self.current.items()
        }

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Takes in the present weights; nothing moves where `skipped` is true, and nobody waits for the device."""
        weight = (1 - self.decay) * ~skipped
        for name, value in self.values.items():
            value.lerp_(self.current[name], weight.to(value.dtype))  # exact where both are equal

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages inside, and its own weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            mine = value.clone()
            value.copy_(self.current[name])
            self.current[name].copy_(mine)
