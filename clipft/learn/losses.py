"""Contrastive losses and their gradients with respect to the features, in tiles.

Every rank holds b rows of a batch of B and all B columns. From its rows and the log-sum-exps of all rows and
columns it forms its own gradients, so the backward needs no communication, and memory grows with B instead of B².
Axes: b local pairs, B pairs of the global batch, D feature width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

TILE_ELEMENTS = 1 << 22  # 16 MiB of fp32 scores at a time
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Unit-norm fp32 features of pairs; `ids` name the pairs that are positives of each other."""

    image: Float[Tensor, "n D"]
    text: Float[Tensor, "n D"]
    ids: Int64[Tensor, " n"]
    valid: Bool[Tensor, " n"]


@dataclass(frozen=True)
class LocalGradients:
    """This rank's part: summed over ranks, `loss` and `log_scale` are those of the global batch."""

    loss: Float[Tensor, ""]
    image: Float[Tensor, "b D"]
    text: Float[Tensor, "b D"]
    log_scale: Float[Tensor, ""]
    shared: Float[Tensor, ""]
    """Local rows that have more than one positive."""


def info_nce(local: Pairs, everyone: Pairs, scale: Float[Tensor, ""], gather: Gather) -> LocalGradients:
    """Symmetric InfoNCE (Radford et al. 2021, fig. 3) with shared positives, as value and gradients.

    With P(i) the valid pairs that have i's id, L = -1/(2n) sum_i sum_{j in P(i)} (log p_ij + log q_ij) / |P(i)|
    over the n valid pairs, p the softmax over texts and q the one over images. Distinct ids give CLIP's loss.
    """
    image_lse = log_sum_exps(local.image, everyone.text, everyone.valid, scale)
    text_lse = log_sum_exps(local.text, everyone.image, everyone.valid, scale)
    all_lse = gather(torch.stack([image_lse, text_lse], dim=1))
    n = everyone.valid.sum().clamp(min=1)
    image = _one_direction(local.image, everyone.text, local, everyone, scale, image_lse, all_lse[:, 1])
    text = _one_direction(local.text, everyone.image, local, everyone, scale, text_lse, all_lse[:, 0])
    return LocalGradients(
        loss=(image.loss + text.loss) / (2 * n),
        image=image.rows * scale / (2 * n),
        text=text.rows * scale / (2 * n),
        log_scale=(image.log_scale + text.log_scale) / (2 * n),
        shared=image.shared,
    )


def log_sum_exps(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "B D"],
    valid: Bool[Tensor, " B"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, " b"]:
    """log sum_j exp(scale <row, column_j>) over the valid columns."""
    total = rows.new_full((len(rows),), -torch.inf)
    for tile in _tiles(len(rows), len(columns)):
        scores = (scale * rows @ columns[tile].T).masked_fill_(~valid[tile], -torch.inf)
        total = torch.logaddexp(total, scores.logsumexp(dim=1))
    return total


@dataclass(frozen=True)
class _Direction:
    loss: Float[Tensor, ""]
    rows: Float[Tensor, "b D"]
    log_scale: Float[Tensor, ""]
    shared: Float[Tensor, ""]


def _one_direction(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "B D"],
    local: Pairs,
    everyone: Pairs,
    scale: Float[Tensor, ""],
    row_lse: Float[Tensor, " b"],
    column_lse: Float[Tensor, " B"],
) -> _Direction:
    """Loss of the rows against the columns, and the gradient that both directions send into the rows."""
    positives = _num_positives(local, everyone)
    gradient, log_scale, aligned = torch.zeros_like(rows), rows.new_zeros(()), torch.zeros_like(row_lse)
    for tile in _tiles(len(rows), len(columns)):
        scores = scale * rows @ columns[tile].T
        same = (local.ids[:, None] == everyone.ids[tile]) & everyone.valid[tile] & local.valid[:, None]
        target = same / positives[:, None]
        usable = local.valid[:, None] & everyone.valid[tile]
        row_error = (scores - row_lse[:, None]).exp().masked_fill_(~usable, 0) - target
        column_error = (scores - column_lse[tile]).exp().masked_fill_(~usable, 0) - target
        gradient += (row_error + column_error) @ columns[tile]
        log_scale = log_scale + (row_error * scores).sum()
        aligned += (target * scores).sum(dim=1)
    loss = (row_lse - aligned).masked_fill(~local.valid, 0).sum()
    return _Direction(loss, gradient, log_scale, ((positives > 1) & local.valid).sum().to(rows.dtype))


def _num_positives(local: Pairs, everyone: Pairs) -> Float[Tensor, " b"]:
    """|P(i)| of the local pairs; 1 for invalid ones, which are left out elsewhere."""
    ids, counts = everyone.ids[everyone.valid].unique(return_counts=True)
    if not len(ids):
        return local.image.new_ones(len(local.ids))
    found = torch.searchsorted(ids, local.ids).clamp(max=len(ids) - 1)
    return counts[found].masked_fill(~local.valid, 1).to(local.image.dtype)


def _tiles(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of columns whose scores against all rows fit in one tile."""
    width = max(64, TILE_ELEMENTS // max(num_rows, 1))
    for start in range(0, num_columns, width):
        yield slice(start, min(start + width, num_columns))
