"""One contrastive step: features, the loss's gradient in them, then the gradients of the parameters.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) joined with one loss over all ranks: the result does not depend
on how the batch is cut into ranks and micro-batches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from clipft.data.loader import Batch
from clipft.data.order import rank_slice
from clipft.learn.gather import gather_known_rows, rank, world
from clipft.learn.losses import LocalGradients, Loss, Pairs

Encode = Callable[[Batch], tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]]


def contrastive_backward(
    encode: Encode,
    logit_scale: nn.Parameter,
    logit_bias: nn.Parameter | None,
    batch: Batch,
    *,
    loss: Loss,
    with_ids: bool,
    batch_size: int,
    micro_batch: int,
    seed: tuple[int, ...],
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager[None]],
) -> LocalGradients:
    """Adds the gradient of the global loss to every `.grad`; returns this rank's part of loss and counts.

    `seed` starts the random draws of each micro-batch, so that its two passes drop the same units.
    """
    micros = batch.split(micro_batch)
    with nullcontext() if len(micros) == 1 else torch.no_grad():
        features = [_encode_seeded(encode, micro, (*seed, rank(), k)) for k, micro in enumerate(micros)]
    image, text = (torch.cat([pair[side].detach() for pair in features]) for side in (0, 1))
    slices = [rank_slice(batch_size, r, world()) for r in range(world())]
    counts = [part.stop - part.start for part in slices]
    local = Pairs(image, text, batch.ids, batch.valid, start=slices[rank()].start)
    scale = logit_scale.detach().float().exp().squeeze()
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias.detach().float().squeeze()
    with torch.autocast(image.device.type, enabled=False):  # scores and their sums are fp32 at any precision
        local, everyone = gather_pairs(local, counts, with_ids)
        gradients = loss(local, everyone, scale, bias, partial(gather_known_rows, counts=counts))
    start = 0
    for k, micro in enumerate(micros):
        stop, last = start + len(micro), k == len(micros) - 1
        with nullcontext() if last else no_sync():
            pair = features[0] if len(micros) == 1 else _encode_seeded(encode, micro, (*seed, rank(), k))
            surrogate = (pair[0] * gradients.image[start:stop]).sum() + (pair[1] * gradients.text[start:stop]).sum()
            if last:  # these partials enter once; they stay in this graph because DDP waits for them
                surrogate = surrogate + (logit_scale * gradients.log_scale).sum()
                if logit_bias is not None:
                    surrogate = surrogate + (logit_bias * gradients.bias).sum()
            backward(surrogate * world())  # DDP averages over ranks, the partials are to be summed
        start = stop
    return gradients


def gather_pairs(local: Pairs, counts: list[int], with_ids: bool) -> tuple[Pairs, Pairs]:
    """The local pairs and those of all ranks: one collective for features and validity, one for ids where they count.

    Without, every pair's id is its place in the global batch.
    """
    width = local.image.shape[1]
    rows = torch.cat([local.image, local.text, local.valid[:, None].to(local.image.dtype)], dim=1)
    rows = gather_known_rows(rows, counts)
    if with_ids:
        ids = gather_known_rows(local.ids, counts)
    else:
        ids = torch.arange(sum(counts), device=rows.device)
        local = replace(local, ids=ids[local.start : local.start + len(local.ids)])
    return local, Pairs(rows[:, :width], rows[:, width : 2 * width], ids, rows[:, -1] > 0)


def _encode_seeded(encode: Encode, micro: Batch, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return encode(micro)
