from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipft.data.loader import Batch
from clipft.data.order import rank_slice
from clipft.learn.gather import gather_known_rows, gather_rows, rank, world
from clipft.learn.step import contrastive_backward

BATCH = 11


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Embedding(50, 16), nn.Dropout(dropout), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, work):
        return work()  # DDP has to see a forward; Lightning calls training_step inside of it

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image = self.image(batch.pixels.flatten(1).float() / 255)
        return F.normalize(image, dim=1), F.normalize(self.text(batch.tokens).mean(dim=1), dim=1)


def make_batch() -> Batch:
    draw = np.random.default_rng(1)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[[3, 8]] = False
    return Batch(
        pixels=torch.from_numpy(draw.integers(0, 256, (BATCH, 2, 2, 3), np.uint8)),
        tokens=torch.from_numpy(draw.integers(0, 50, (BATCH, 5))),
        valid=valid,
        ids=torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8, 9, 10]),
        keys=[str(i) for i in range(BATCH)],
        dropped={},
    )


def whole_batch_gradients(towers: Towers) -> dict[str, Tensor]:
    """Plain autograd on the joined batch, invalid rows cut out, with the loss from its definition."""
    batch = make_batch()
    image, text = (side[batch.valid] for side in towers.encode(batch))
    ids = batch.ids[batch.valid]
    target = (ids[:, None] == ids).float()
    target /= target.sum(dim=1, keepdim=True)
    logits = towers.logit_scale.exp() * image @ text.T
    loss = -(target * logits.log_softmax(1)).sum(1).mean() / 2 - (target * logits.T.log_softmax(1)).sum(1).mean() / 2
    loss.backward()
    return {"loss": loss.detach(), **gradients(towers)}


def gradients(towers: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in towers.named_parameters() if parameter.grad is not None}


def step_gradients(micro_batch: int, dropout: float = 0.0) -> dict[str, Tensor]:
    """Gradients after one step of ours on this rank's slice, under DDP where there are several ranks."""
    towers = Towers(dropout)
    wrapped = DistributedDataParallel(towers) if world() > 1 else None
    batch = make_batch()._rows(rank_slice(BATCH, rank(), world()))

    def work():
        return contrastive_backward(
            towers.encode,
            towers.logit_scale,
            batch,
            batch_size=BATCH,
            micro_batch=micro_batch,
            seed=(0, 0),
            backward=prepared_backward(wrapped),
            no_sync=wrapped.no_sync if wrapped else nullcontext,
        )

    local = wrapped(work) if wrapped else work()
    return {"loss": gather_rows(local.loss[None]).sum(), **gradients(towers)}


def prepared_backward(wrapped: DistributedDataParallel | None):
    """What Lightning's manual_backward does: tells DDP's reducer about this backward before it starts."""

    def backward(loss: Tensor) -> None:
        if wrapped is not None and wrapped.require_backward_grad_sync:
            wrapped.reducer.prepare_for_backward([])
        loss.backward()

    return backward


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys() and "logit_scale" in ours
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 11, 100])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch):
    assert_same(step_gradients(micro_batch), whole_batch_gradients(Towers()))


@pytest.mark.process
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("micro_batch", [100, 2])
def test_ranks_give_the_gradients_of_one_process_on_the_joined_batch(tmp_path, num_ranks, micro_batch):
    expected = whole_batch_gradients(Towers())
    for ours in on_ranks(num_ranks, tmp_path, step_gradients, micro_batch):
        assert_same(ours, expected)


def test_both_passes_of_a_micro_batch_drop_the_same_units(monkeypatch):
    """The loss's gradient belongs to the features of the first pass: the second has to be at the same point."""
    seen: list[Tensor] = []
    encode = Towers.encode

    def watched(self, batch):
        image, text = encode(self, batch)
        seen.append(torch.cat([image, text], dim=1).detach())
        return image, text

    monkeypatch.setattr(Towers, "encode", watched)
    step_gradients(micro_batch=4, dropout=0.5)
    first, second = seen[:3], seen[3:]
    assert len(second) == 3 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(seen[0], seen[1])


def gathered() -> dict[str, Tensor]:
    rows = torch.full((rank() + 1, 2), float(rank()))
    return {"unknown": gather_rows(rows), "known": gather_known_rows(rows, [1, 2, 3])}


@pytest.mark.process
def test_gathered_rows_come_in_the_order_of_ranks_whatever_their_number(tmp_path):
    expected = torch.tensor([0, 1, 1, 2, 2, 2]).float()[:, None].expand(6, 2)
    for each in on_ranks(3, tmp_path, gathered):
        assert torch.equal(each["unknown"], expected) and torch.equal(each["known"], expected)
