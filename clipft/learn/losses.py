"""Contrastive losses and their gradients with respect to the features, in tiles.

Every rank holds b rows of a batch of B and all B columns. From these, and from the log-sum-exps of all rows and
columns where the loss has any, it forms its own gradients, so the backward needs no communication, and memory grows
with B instead of B².
Axes: b local pairs, B pairs of the global batch, n pairs of either, D feature width, c columns of a tile.
"""

import math
from collections.abc import Callable, Iterable, Iterator
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
    """Unit-norm fp32 features of pairs; `ids`, 0 or more, name the pairs that are positives of each other."""

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
    rows, tiles = scaled_rows(local, scale), tiled(local, everyone, mask)
    lse = log_sum_exps(rows, tiles)
    all_lse = gather(lse.mT).mT
    n, positives = everyone.valid.sum().clamp(min=1), num_positives(local, everyone)
    weights = (1 - smoothing) / (torch.ones_like(positives) if mask else positives)
    targets = _Targets(weights)
    if smoothing:
        targets = _Targets(weights, *(smoothing / num_counted(some, everyone, mask) for some in (local, everyone)))
    sums = _softmax_sums(rows, tiles, lse, all_lse.flip(0), targets)
    image, text = sums.rows.mul_(scale / (2 * n))
    return LocalGradients(
        loss=sums.loss / (2 * n),
        image=image,
        text=text,
        log_scale=sums.log_scale / (2 * n),
        bias=torch.zeros_like(sums.bias),
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
    sums = _sigmoid_sums(scaled_rows(local, scale), tiled(local, everyone, mask), bias)
    image, text = sums.rows.mul_(scale / n)
    return LocalGradients(
        loss=sums.loss / n,
        image=image,
        text=text,
        log_scale=sums.log_scale / n,
        bias=sums.bias / n,
        shared=(num_positives(local, everyone) > 1).sum().to(sums.loss.dtype),
        finite=finite_rows(local),
    )


LOSSES = {"clip": info_nce, "siglip": siglip}


@dataclass(frozen=True)
class Tile:
    """Columns that are scored together: texts against the local images, images against the local texts."""

    at: slice
    columns: Float[Tensor, "2 c D"]
    positive: Bool[Tensor, "b c"]
    ignored: Bool[Tensor, "b c"]
    """Pairs that are in no softmax."""

    def scores(self, rows: Float[Tensor, "2 b D"]) -> Float[Tensor, "2 b c"]:
        return rows @ self.columns.mT


Tiles = Callable[[], Iterable[Tile]]


def scaled_rows(local: Pairs, scale: Float[Tensor, ""]) -> Float[Tensor, "2 b D"]:
    return torch.stack([local.image, local.text]).mul_(scale)


def log_sum_exps(rows: Float[Tensor, "2 b D"], tiles: Tiles, with_positives: bool = True) -> Float[Tensor, "2 b"]:
    """log sum_j exp(scale <row, column_j>) over the columns that count for the row; -inf where none does."""
    total = rows.new_full(rows.shape[:2], -torch.inf)
    for tile in tiles():
        ignored = tile.ignored if with_positives else tile.ignored | tile.positive
        total = torch.logaddexp(total, tile.scores(rows).masked_fill_(ignored, -torch.inf).logsumexp(dim=2))
    return total


@dataclass(frozen=True)
class _Sums:
    """Sums over the local rows; `rows` is the gradient in them, of both directions, over the scale."""

    loss: Float[Tensor, ""]
    rows: Float[Tensor, "2 b D"]
    log_scale: Float[Tensor, ""]
    bias: Float[Tensor, ""]


@dataclass(frozen=True)
class _Targets:
    """What a softmax should be: `positive` at each positive of a row, and `rows` or `columns` at all that it counts."""

    positive: Float[Tensor, " b"]
    rows: Float[Tensor, " b"] | None = None
    columns: Float[Tensor, " B"] | None = None


def _softmax_sums(
    rows: Float[Tensor, "2 b D"],
    tiles: Tiles,
    row_lse: Float[Tensor, "2 b"],
    column_lse: Float[Tensor, "2 B"],
    targets: _Targets,
) -> _Sums:
    gradient, loss, log_scale = torch.zeros_like(rows), rows.new_zeros(()), rows.new_zeros(())
    for tile in tiles():
        scores = tile.scores(rows)
        row_target = column_target = tile.positive * targets.positive[:, None]
        if targets.rows is not None and targets.columns is not None:
            row_target = row_target + ~tile.ignored * targets.rows[:, None]
            column_target = column_target + ~tile.ignored * targets.columns[tile.at]
        log_p = scores - row_lse[:, :, None]
        loss = loss - (log_p.masked_fill(tile.ignored, 0) * row_target).sum()
        row_error = log_p.exp_().masked_fill_(tile.ignored, 0).sub_(row_target)
        log_scale = log_scale + (row_error * scores).sum()
        column_error = (
            scores.sub_(column_lse[:, None, tile.at]).exp_().masked_fill_(tile.ignored, 0).sub_(column_target)
        )
        gradient.baddbmm_(row_error.add_(column_error), tile.columns)
    return _Sums(loss, gradient, log_scale, torch.zeros_like(loss))


def _sigmoid_sums(rows: Float[Tensor, "2 b D"], tiles: Tiles, bias: Float[Tensor, ""]) -> _Sums:
    """Of the images' rows but for the gradient: the texts' have the same terms, shared out over ranks by text."""
    gradient, loss = torch.zeros_like(rows), rows.new_zeros(())
    log_scale, bias_sum = torch.zeros_like(loss), torch.zeros_like(loss)
    for tile in tiles():
        scores = tile.scores(rows)
        sign = tile.positive.to(rows.dtype).mul_(2).sub_(1)
        margin = (scores + bias).mul_(sign)
        loss = loss - F.logsigmoid(margin[0]).masked_fill_(tile.ignored, 0).sum()
        error = margin.neg_().sigmoid_().mul_(sign).neg_().masked_fill_(tile.ignored, 0)
        log_scale = log_scale + (error[0] * scores[0]).sum()
        bias_sum = bias_sum + error[0].sum()
        gradient.baddbmm_(error, tile.columns)
    return _Sums(loss, gradient, log_scale, bias_sum)


def num_positives(some: Pairs, everyone: Pairs) -> Float[Tensor, " n"]:
    """|P(i)| of some of the pairs, without waiting for the device; 1 for those that are not valid."""
    ids = everyone.ids.masked_fill(~everyone.valid, -1).sort().values
    first, stop = (torch.searchsorted(ids, some.ids, right=right) for right in (False, True))
    return (stop - first).masked_fill(~some.valid, 1).to(some.image.dtype)


def num_counted(some: Pairs, everyone: Pairs, mask: bool) -> Float[Tensor, " n"]:
    """c_i, the pairs in the softmax of some of the pairs."""
    n = everyone.valid.sum().clamp(min=1).to(some.image.dtype)
    return n - num_positives(some, everyone) + 1 if mask else n.expand(len(some.ids))


def bias_of_softmax(pairs: Pairs, scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The bias with which sigmoids say of a pair what a softmax among these pairs says: -log sum_j exp(scale <i, j>).

    Over the j that are no positives of i; the mean over i and both directions. Where all cosines are 0 it is the log
    odds of one right pair among so many.
    """
    sums = log_sum_exps(scaled_rows(pairs, scale), tiled(pairs, pairs, mask=False), with_positives=False)
    return -sums[sums.isfinite()].mean()


def finite_rows(local: Pairs) -> Bool[Tensor, " b"]:
    return (local.image + local.text).sum(dim=1).isfinite()  # parts of unit vectors: finite ones have a finite sum


def tiled(local: Pairs, everyone: Pairs, mask: bool) -> Tiles:
    """The columns in tiles whose scores against the local rows have room; each pass over several makes them anew."""
    width = max(64, TILE_ELEMENTS // max(2 * len(local.ids), 1))
    each = partial(_each_tile, local, everyone, mask, width)
    if len(everyone.ids) > width:
        return each
    only = list(each())
    return lambda: only


def _each_tile(local: Pairs, everyone: Pairs, mask: bool, width: int) -> Iterator[Tile]:
    num_rows, num_columns = len(local.ids), len(everyone.ids)
    for start in range(0, num_columns, width):
        at = slice(start, min(start + width, num_columns))
        counted = local.valid[:, None] & everyone.valid[at]
        positive = (local.ids[:, None] == everyone.ids[at]) & counted
        if mask:
            row = torch.arange(local.start, local.start + num_rows, device=local.ids.device)
            itself = row[:, None] == torch.arange(at.start, at.stop, device=row.device)
            counted &= ~positive | itself
            positive &= itself
        yield Tile(at, torch.stack([everyone.text[at], everyone.image[at]]), positive, ~counted)


def chance_loss(name: str, batch_size: int) -> float:
    """Loss of a model that knows nothing but how many pairs a batch has."""
    negatives = batch_size - 1
    if name == "siglip":  # each score the log odds of one positive among so many negatives
        return math.log(batch_size) + negatives * math.log(batch_size / negatives)
    return math.log(batch_size)
