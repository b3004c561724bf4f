from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from clipft.learn import losses
from clipft.learn.losses import Pairs, info_nce


def pairs(n: int, ids: list[int] | None = None, valid: list[bool] | None = None) -> Pairs:
    generator = torch.Generator().manual_seed(n)
    image, text = (F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return Pairs(image, text, torch.tensor(ids or list(range(n))), torch.tensor(valid or [True] * n))


def loop_loss(p: Pairs, scale: Tensor) -> Tensor:
    """The definition, one term at a time, in float64."""
    rows = [i for i in range(len(p.ids)) if p.valid[i]]
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        for query, gallery in ((p.image, p.text), (p.text, p.image)):
            scores = torch.stack([scale * query[i] @ gallery[j] for j in rows])
            log_p = scores - torch.log(torch.exp(scores).sum())
            positives = [k for k, j in enumerate(rows) if p.ids[j] == p.ids[i]]
            total = total - log_p[positives].mean()
    return total / (2 * len(rows))


def gradients_of(loss_of, p: Pairs, log_scale: float) -> tuple[Tensor, ...]:
    image, text = p.image.clone().requires_grad_(), p.text.clone().requires_grad_()
    logit_scale = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
    loss = loss_of(Pairs(image, text, p.ids, p.valid), logit_scale.exp())
    return loss.detach(), *torch.autograd.grad(loss, (image, text, logit_scale))


CASES = {
    "distinct": pairs(6),
    "shared positives": pairs(7, ids=[0, 1, 0, 3, 1, 0, 6]),
    "invalid rows": pairs(6, valid=[True, False, True, True, False, True]),
    "shared and invalid": pairs(6, ids=[4, 4, 2, 4, 2, 5], valid=[True, False, True, True, True, True]),
    "one valid row": pairs(3, valid=[False, True, False]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("log_scale", [0.0, 2.659, 4.605])
def test_info_nce_is_the_definition_in_value_and_gradients(case, log_scale):
    p = CASES[case]
    loss, image, text, scale = gradients_of(loop_loss, p, log_scale)
    ours = info_nce(p, p, torch.tensor(log_scale, dtype=torch.float64).exp(), lambda rows: rows)
    assert_close((ours.loss, ours.image, ours.text, ours.log_scale), (loss, image, text, scale))


def test_info_nce_of_distinct_pairs_is_open_clips_loss():
    from open_clip.loss import ClipLoss

    p = pairs(9)
    loss, image, text, scale = gradients_of(lambda q, s: ClipLoss()(q.image, q.text, s), p, 2.0)
    ours = info_nce(p, p, torch.tensor(2.0, dtype=torch.float64).exp(), lambda rows: rows)
    assert_close((ours.loss, ours.image, ours.text, ours.log_scale), (loss, image, text, scale))


def test_the_parts_of_ranks_are_rows_and_summands_of_the_whole():
    whole = CASES["shared and invalid"]
    scale = torch.tensor(10.0, dtype=torch.float64)
    expected = info_nce(whole, whole, scale, lambda rows: rows)
    lse = [
        losses.log_sum_exps(a, b, whole.valid, scale) for a, b in ((whole.image, whole.text), (whole.text, whole.image))
    ]
    parts = [
        info_nce(
            Pairs(whole.image[s], whole.text[s], whole.ids[s], whole.valid[s]),
            whole,
            scale,
            lambda _: torch.stack(lse, 1),
        )
        for s in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert_close(torch.cat([part.image for part in parts]), expected.image)
    assert_close(torch.cat([part.text for part in parts]), expected.text)
    assert_close(torch.stack([part.loss for part in parts]).sum(), expected.loss)
    assert_close(torch.stack([part.log_scale for part in parts]).sum(), expected.log_scale)
    assert torch.stack([part.shared for part in parts]).sum() == expected.shared


def test_tiles_do_not_change_the_result(monkeypatch):
    p = pairs(200, ids=[i // 3 for i in range(200)])
    scale = torch.tensor(20.0, dtype=torch.float64)
    whole = info_nce(p, p, scale, lambda rows: rows)
    monkeypatch.setattr(losses, "TILE_ELEMENTS", 1)  # the narrowest tiles: 64 columns
    tiled = info_nce(p, p, scale, lambda rows: rows)
    assert_close(
        (tiled.loss, tiled.image, tiled.text, tiled.log_scale),
        (whole.loss, whole.image, whole.text, whole.log_scale),
    )


def test_shared_counts_the_rows_with_several_valid_positives():
    p = CASES["shared and invalid"]
    expected = sum(
        any(i != j and p.valid[j] and p.ids[i] == p.ids[j] for j in range(6)) for i in range(6) if p.valid[i]
    )
    assert info_nce(p, p, torch.tensor(1.0, dtype=torch.float64), lambda rows: rows).shared == expected == 4


def test_a_batch_without_valid_pairs_has_no_loss_and_no_gradient():
    p = pairs(3, valid=[False] * 3)
    ours = info_nce(p, p, torch.tensor(5.0, dtype=torch.float64), lambda rows: rows)
    assert ours.loss == 0 and ours.log_scale == 0 and not ours.image.any() and not ours.text.any()


def test_scores_of_identical_features_at_the_largest_scale_stay_finite():
    same = F.normalize(torch.ones(4, 8), dim=1)
    p = Pairs(same, same, torch.arange(4), torch.ones(4, dtype=torch.bool))
    ours = info_nce(p, p, torch.tensor(100.0), lambda rows: rows)
    assert_close(ours.loss, torch.tensor(4.0).log())
    assert all(torch.isfinite(part).all() for part in (ours.image, ours.text, ours.log_scale))


def test_every_case_has_both_directions():
    """Swapping the sides swaps the gradients and leaves the loss."""
    for p, scale in product(CASES.values(), (1.0, 30.0)):
        scale = torch.tensor(scale, dtype=torch.float64)
        one = info_nce(p, p, scale, lambda rows: rows)
        swapped = Pairs(p.text, p.image, p.ids, p.valid)
        other = info_nce(swapped, swapped, scale, lambda rows: rows)
        assert_close((one.loss, one.image, one.text), (other.loss, other.text, other.image))
