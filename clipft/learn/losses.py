"""Contrastive losses and their gradients with respect to the features, in tiles.

Every rank holds b rows of a batch of B and all B columns. From these, and from the log-sum-exps of all rows and
columns where the loss has any, it forms its own gradients, so the backward needs no communication, and memory grows
with B instead of B².
Axes: b local pairs, B pairs of the global batch, n pairs of either, D feature width, c columns of a tile.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

TILE_ELEMENTS = 1 << 20  # 4 MiB of fp32 scores at a time
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Unit-norm fp32 features of pairs; `ids` name the pairs that are positives of each other."""

    image: Float[Tensor, "n D"]
    text: Float[Tensor, "n D"]
    ids: Int64[Tensor, " n"]
    valid: Bool[Tensor, " n"]
    start: int = 0
    """Place of the first of these pairs in the global batch."""


@dataclass(frozen=True)
class LocalGradients:
    """This rank's part: summed over ranks, `loss`, `log_scale` and `bias` are those of the global batch."""

    loss: Float[Tensor, ""]
    image: Float[Tensor, "b D"]
    text: Float[Tensor, "b D"]
    log_scale: Float[Tensor, ""]
    bias: Float[Tensor, ""]
    shared: Float[Tensor, ""]
    """Local rows that have more than one positive."""
    finite: Bool[Tensor, " b"]
    """Local rows whose features were finite on both sides."""


Loss = Callable[[Pairs, Pairs, Float[Tensor, ""], Float[Tensor, ""], Gather], LocalGradients]
"""Local pairs, all pairs, scale, bias and the gathering of rows -> this rank's part."""


def build_loss(name: str, duplicates: str, label_smoothing: float = 0.0) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"loss.name={name!r} is unknown. Use one of {sorted(LOSSES)}, or add to LOSSES.")
    if duplicates not in ("share", "mask"):
        raise ValueError(f"loss.duplicates={duplicates!r} is unknown. Use share or mask.")
    if label_smoothing and name != "clip":
        raise ValueError(f"loss.label_smoothing={label_smoothing} would be ignored: loss.name={name} has no softmax.")
    smoothing = {"smoothing": label_smoothing} if name == "clip" else {}
    return partial(LOSSES[name], mask=duplicates == "mask", **smoothing)


def info_nce(
    local: Pairs,
    everyone: Pairs,
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],  # a softmax does not see it
    gather: Gather,
    *,
    mask: bool,
    smoothing: float = 0.0,
) -> LocalGradients:
    """Symmetric InfoNCE (Radford et al. 2021, fig. 3), as value and gradients.

    With P(i) the valid pairs that have i's id, L = -1/(2n) sum_i sum_{j in P(i)} (log p_ij + log q_ij) / |P(i)|
    over the n valid pairs, p the softmax over texts and q the one over images. Distinct ids give CLIP's loss.
    `mask` leaves all of P(i) but i out of the target and out of both softmaxes. `smoothing` moves that share of each
    target to all c_i pairs in its softmax, evenly (Szegedy et al. 2016, sec. 7).
    """
    image_lse = log_sum_exps(local.image, everyone.text, local, everyone, scale, mask)
    text_lse = log_sum_exps(local.text, everyone.image, local, everyone, scale, mask)
    all_lse = gather(torch.stack([image_lse, text_lse], dim=1))
    n, positives = everyone.valid.sum().clamp(min=1), num_positives(local, everyone)
    weights = (1 - smoothing) * (torch.ones_like(image_lse) if mask else 1 / positives)
    targets = _Targets(weights)
    if smoothing:
        rows, columns = (smoothing / num_counted(some, everyone, mask) for some in (local, everyone))
        targets = _Targets(weights, rows, columns)
    image = _softmax_part(local.image, everyone.text, local, everyone, scale, image_lse, all_lse[:, 1], targets, mask)
    text = _softmax_part(local.text, everyone.image, local, everyone, scale, text_lse, all_lse[:, 0], targets, mask)
    return LocalGradients(
        loss=(image.loss + text.loss) / (2 * n),
        image=image.rows * scale / (2 * n),
        text=text.rows * scale / (2 * n),
        log_scale=(image.log_scale + text.log_scale) / (2 * n),
        bias=torch.zeros_like(image.bias),
        shared=(positives > 1).sum().to(weights.dtype),
        finite=finite_rows(local),
    )


def siglip(
    local: Pairs,
    everyone: Pairs,
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    gather: Gather,  # needs nothing of other ranks but their features
    *,
    mask: bool,
) -> LocalGradients:
    """Sigmoid loss (Zhai et al. 2023, alg. 1), as value and gradients.

    L = -1/n sum_i sum_j log sigmoid(z_ij (scale <image_i, text_j> + bias)) over the n valid pairs, z_ij = 1 where j
    has i's id, else -1. `mask` leaves the pairs of equal ids but i = j out of the sum.
    """
    n = everyone.valid.sum().clamp(min=1)
    image = _sigmoid_part(local.image, everyone.text, local, everyone, scale, bias, mask)
    text = _sigmoid_part(local.text, everyone.image, local, everyone, scale, bias, mask)
    return LocalGradients(
        loss=image.loss / n,  # the texts' part has the same terms, shared out over ranks by text
        image=image.rows * scale / n,
        text=text.rows * scale / n,
        log_scale=image.log_scale / n,
        bias=image.bias / n,
        shared=(num_positives(local, everyone) > 1).sum().to(image.loss.dtype),
        finite=finite_rows(local),
    )


LOSSES = {"clip": info_nce, "siglip": siglip}


def log_sum_exps(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "B D"],
    local: Pairs,
    everyone: Pairs,
    scale: Float[Tensor, ""],
    mask: bool,
    with_positives: bool = True,
) -> Float[Tensor, " b"]:
    """log sum_j exp(scale <row, column_j>) over the columns that count for the row; -inf where none does."""
    total = rows.new_full((len(rows),), -torch.inf)
    for tile, positive, counted in _tiles(local, everyone, mask):
        summed = counted if with_positives else counted & ~positive
        scores = (scale * rows @ columns[tile].T).masked_fill_(~summed, -torch.inf)
        total = torch.logaddexp(total, scores.logsumexp(dim=1))
    return total


@dataclass(frozen=True)
class _Part:
    """Sums over the local rows of one side; `rows` is the gradient in them, of both directions, over the scale."""

    loss: Float[Tensor, ""]
    rows: Float[Tensor, "b D"]
    log_scale: Float[Tensor, ""]
    bias: Float[Tensor, ""]


@dataclass(frozen=True)
class _Targets:
    """What a softmax should be: `positive` at each positive of a row, and `rows` or `columns` at all that it counts."""

    positive: Float[Tensor, " b"]
    rows: Float[Tensor, " b"] | None = None
    columns: Float[Tensor, " B"] | None = None


def _softmax_part(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "B D"],
    local: Pairs,
    everyone: Pairs,
    scale: Float[Tensor, ""],
    row_lse: Float[Tensor, " b"],
    column_lse: Float[Tensor, " B"],
    targets: _Targets,
    mask: bool,
) -> _Part:
    gradient, loss, log_scale = torch.zeros_like(rows), rows.new_zeros(()), rows.new_zeros(())
    for tile, positive, counted in _tiles(local, everyone, mask):
        scores = scale * rows @ columns[tile].T
        row_target = column_target = positive * targets.positive[:, None]
        if targets.rows is not None and targets.columns is not None:
            row_target = row_target + counted * targets.rows[:, None]
            column_target = column_target + counted * targets.columns[tile]
        log_p = scores - row_lse[:, None]
        loss = loss - (log_p.masked_fill(~counted, 0) * row_target).sum()
        row_error = log_p.exp_().masked_fill_(~counted, 0).sub_(row_target)
        log_scale = log_scale + (row_error * scores).sum()
        column_error = (scores - column_lse[tile]).exp_().masked_fill_(~counted, 0).sub_(column_target)
        gradient += row_error.add_(column_error) @ columns[tile]
    return _Part(loss, gradient, log_scale, torch.zeros_like(loss))


def _sigmoid_part(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "B D"],
    local: Pairs,
    everyone: Pairs,
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    mask: bool,
) -> _Part:
    gradient, loss = torch.zeros_like(rows), rows.new_zeros(())
    log_scale, bias_sum = torch.zeros_like(loss), torch.zeros_like(loss)
    for tile, positive, counted in _tiles(local, everyone, mask):
        scores = scale * rows @ columns[tile].T
        sign = positive.to(rows.dtype).mul_(2).sub_(1)
        margin = (scores + bias).mul_(sign)
        loss = loss - F.logsigmoid(margin).masked_fill_(~counted, 0).sum()
        error = margin.neg_().sigmoid_().mul_(sign).neg_().masked_fill_(~counted, 0)
        log_scale = log_scale + (error * scores).sum()
        bias_sum = bias_sum + error.sum()
        gradient += error @ columns[tile]
    return _Part(loss, gradient, log_scale, bias_sum)


def num_positives(some: Pairs, everyone: Pairs) -> Float[Tensor, " n"]:
    """|P(i)| of some of the pairs, without waiting for the device; 1 for those that are not valid."""
    ids, order = everyone.ids.sort()
    below = F.pad(everyone.valid[order].cumsum(0), (1, 0))  # valid ones among the first k ids
    first, stop = (torch.searchsorted(ids, some.ids, right=right) for right in (False, True))
    return (below[stop] - below[first]).masked_fill(~some.valid, 1).to(some.image.dtype)


def num_counted(some: Pairs, everyone: Pairs, mask: bool) -> Float[Tensor, " n"]:
    """c_i, the pairs in the softmax of some of the pairs."""
    n = everyone.valid.sum().clamp(min=1).to(some.image.dtype)
    return n - num_positives(some, everyone) + 1 if mask else n.expand(len(some.ids))


def bias_of_softmax(pairs: Pairs, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The bias with which sigmoids say of a pair what a softmax among these pairs says: -log sum_j exp(scale <i, j>).

    Over the j that are no positives of i; the mean over i and both directions. Where all cosines are 0 it is the log
    odds of one right pair among so many.
    """
    sides = ((pairs.image, pairs.text), (pairs.text, pairs.image))
    sums = [
        log_sum_exps(rows, columns, pairs, pairs, scale, mask=False, with_positives=False) for rows, columns in sides
    ]
    every = torch.cat(sums)
    return -every[every.isfinite()].mean()


def finite_rows(local: Pairs) -> Bool[Tensor, " b"]:
    return local.image.isfinite().all(dim=1) & local.text.isfinite().all(dim=1)


def _tiles(
    local: Pairs, everyone: Pairs, mask: bool
) -> Iterator[tuple[slice, Bool[Tensor, "b c"], Bool[Tensor, "b c"]]]:
    """Slices of columns whose scores against the local rows fit in a tile; which pairs are positive, which count."""
    num_rows, num_columns = len(local.ids), len(everyone.ids)
    width = max(64, TILE_ELEMENTS // max(num_rows, 1))
    row = torch.arange(local.start, local.start + num_rows, device=local.ids.device)
    column = torch.arange(num_columns, device=local.ids.device)
    for start in range(0, num_columns, width):
        tile = slice(start, min(start + width, num_columns))
        counted = local.valid[:, None] & everyone.valid[tile]
        positive = (local.ids[:, None] == everyone.ids[tile]) & counted
        if mask:
            itself = row[:, None] == column[tile]
            counted &= ~positive | itself
            positive &= itself
        yield tile, positive, counted


def chance_loss(name: str, batch_size: int) -> float:
    """Loss of a model that knows nothing but how many pairs a batch has."""
    negatives = batch_size - 1
    if name == "siglip":  # each score the log odds of one positive among so many negatives
        return math.log(batch_size) + negatives * math.log(batch_size / negatives)
    return math.log(batch_size)
