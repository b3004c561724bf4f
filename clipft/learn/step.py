"""One contrastive step: features, the loss's gradient in them, then the gradients of the parameters.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) joined with one loss over all ranks: the result does not depend
on how the batch is cut into ranks and micro-batches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipft.data.loader import Batch
from clipft.data.order import rank_slice
from clipft.learn.gather import gather_known_rows, rank, world
from clipft.learn.losses import LocalGradients, Loss, Pairs

Encode = Callable[[Batch], Float[Tensor, "b D"]]


@dataclass(frozen=True)
class Tower:
    """How a batch becomes one side's unit features; a tower that is not trained does so once a step, without graph."""

    encode: Encode
    trained: bool = True

    def features(self, batch: Batch, graph: bool) -> Float[Tensor, "b D"]:
        with nullcontext() if graph and self.trained else torch.no_grad():
            return self.encode(batch)


@dataclass(frozen=True)
class Towers:
    image: Tower
    text: Tower


def contrastive_backward(
    towers: Towers,
    logit_scale: nn.Parameter,
    logit_bias: nn.Parameter | None,
    batch: Batch,
    *,
    loss: Loss,
    with_ids: bool,
    gather_dtype: torch.dtype | None = None,
    batch_size: int,
    micro_batch: int,
    seed: tuple[int, ...],
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager[None]],
) -> LocalGradients:
    """Adds the gradient of the global loss to every `.grad`; returns this rank's part of loss and counts.

    `seed` starts the random draws of each micro-batch, so that its two passes drop the same units.
    """
    micros, sides = batch.split(micro_batch), (towers.image, towers.text)

    def encode(side: int, k: int, graph: bool) -> Tensor:
        seed_draws((*seed, rank(), k, side))
        return sides[side].features(micros[k], graph)

    once = len(micros) == 1
    features = [[encode(side, k, graph=once) for k in range(len(micros))] for side in (0, 1)]
    image, text = (parts[0].detach() if once else torch.cat(parts).detach() for parts in features)
    local, counts = local_pairs(image, text, batch, batch_size)
    scale = logit_scale.detach().float().exp().squeeze()
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias.detach().float().squeeze()
    with torch.autocast(image.device.type, enabled=False):  # scores and their sums are fp32 at any precision
        local, everyone = gather_pairs(local, counts, with_ids, gather_dtype)
        gradients = loss(local, everyone, scale, bias, partial(gather_known_rows, counts=counts))
    start = 0
    for k, micro in enumerate(micros):
        stop, last = start + len(micro), k == len(micros) - 1
        with nullcontext() if last else no_sync():
            given: list[tuple[Tensor, Tensor]] = []
            for side, gradient in enumerate((gradients.image, gradients.text)):
                if sides[side].trained:
                    part = features[side][k] if once else encode(side, k, graph=True)
                    given.append((part, gradient[start:stop]))
            if last:  # these partials enter once; they stay in this graph because DDP waits for them
                leaves = ((logit_scale, gradients.log_scale), (logit_bias, gradients.bias))
                given += [(leaf, part.expand_as(leaf)) for leaf, part in leaves if leaf is not None]
            if given:  # DDP averages over ranks, the partials are to be summed
                tensors, parts = zip(*given, strict=True)
                backward(_Joined.apply([part * world() for part in parts], *tensors))
        start = stop
    return gradients


class _Joined(torch.autograd.Function):
    """A scalar whose gradient in each of the tensors is the one that is given for it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * grad_outputs[0] for gradient in ctx.gradients)


def local_pairs(
    image: Float[Tensor, "b D"], text: Float[Tensor, "b D"], batch: Batch, batch_size: int
) -> tuple[Pairs, list[int]]:
    """This rank's pairs with their place in the global batch, and how many each rank has."""
    slices = [rank_slice(batch_size, r, world()) for r in range(world())]
    pairs = Pairs(image, text, batch.ids, batch.valid, start=slices[rank()].start)
    return pairs, [part.stop - part.start for part in slices]


def gather_pairs(
    local: Pairs, counts: list[int], with_ids: bool, dtype: torch.dtype | None = None
) -> tuple[Pairs, Pairs]:
    """The local pairs and those of all ranks: one collective for features and validity, one for ids where they count.

    Without, every pair's id is its place in the global batch. With a dtype the features of all are rounded to it, the
    local ones too and on a single rank too, so that all ranks see the same and their number does not matter.
    """
    if len(counts) == 1 and dtype is None:
        alone = local if with_ids else replace(local, ids=torch.arange(len(local.ids), device=local.ids.device))
        return alone, alone
    width, wide = local.image.shape[1], local.image.dtype
    rows = torch.cat([local.image, local.text, local.valid[:, None].to(wide)], dim=1).to(dtype or wide)
    if dtype is not None:
        local = replace(local, image=rows[:, :width].to(wide), text=rows[:, width : 2 * width].to(wide))
    rows = gather_known_rows(rows, counts).to(wide)
    if with_ids:
        ids = gather_known_rows(local.ids, counts)
    else:
        ids = torch.arange(sum(counts), device=rows.device)
        local = replace(local, ids=ids[local.start : local.start + len(local.ids)])
    return local, Pairs(rows[:, :width], rows[:, width : 2 * width], ids, rows[:, -1] > 0)


def seed_draws(seed: tuple[int, ...]) -> None:
    """Starts the random draws of this process's devices; torch.manual_seed does so for all that there could be.

    For a GPU that is not in use it writes down where it was called, which takes longer than a small model's loss.
    """
    number = int.from_bytes(blake2b(repr(seed).encode(), digest_size=7).digest())
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)
