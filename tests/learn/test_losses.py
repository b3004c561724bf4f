import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from threading import Barrier

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from clipft.learn import losses
from clipft.learn.losses import LocalGradients, Loss, Pairs, bias_of_softmax, build_loss
from clipft.learn.memory import peak_bytes

SMOOTHING = 0.2
NAMES = ("clip", "smoothed", "siglip")  # smoothed: clip under loss.label_smoothing


def make_loss(name: str, duplicates: str) -> Loss:
    return build_loss("clip", duplicates, SMOOTHING) if name == "smoothed" else build_loss(name, duplicates)


def pairs(n: int, ids: list[int] | None = None, valid: list[bool] | None = None) -> Pairs:
    generator = torch.Generator().manual_seed(n)
    image, text = (F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return Pairs(image, text, torch.tensor(ids or list(range(n))), torch.tensor(valid or [True] * n))


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def loop_info_nce(p: Pairs, scale: Tensor, bias: Tensor, duplicates: str, smoothing: float = 0.0) -> Tensor:
    """The definition, one term at a time, in float64."""
    rows = [i for i in range(len(p.ids)) if p.valid[i]]
    total = double(0.0)
    for i in rows:
        others = [j for j in rows if j != i and p.ids[j] == p.ids[i]]
        left_out = others if duplicates == "mask" else []
        for query, gallery in ((p.image, p.text), (p.text, p.image)):
            score = {j: scale * query[i] @ gallery[j] + bias for j in rows if j not in left_out}
            log_sum = torch.stack([value.exp() for value in score.values()]).sum().log()
            positives = [i, *(j for j in others if j not in left_out)]
            of_positives = sum((score[j] - log_sum for j in positives), double(0.0)) / len(positives)
            of_all = sum((value - log_sum for value in score.values()), double(0.0)) / len(score)
            total = total - (1 - smoothing) * of_positives - smoothing * of_all
    return total / (2 * max(len(rows), 1))


def loop_siglip(p: Pairs, scale: Tensor, bias: Tensor, duplicates: str) -> Tensor:
    rows = [i for i in range(len(p.ids)) if p.valid[i]]
    total = double(0.0)
    for i, j in product(rows, rows):
        positive = bool(p.ids[i] == p.ids[j])
        if duplicates == "mask" and positive and i != j:
            continue
        logit = scale * p.image[i] @ p.text[j] + bias
        total = total - F.logsigmoid(logit if positive else -logit)
    return total / max(len(rows), 1)


LOOPS = {"clip": loop_info_nce, "smoothed": partial(loop_info_nce, smoothing=SMOOTHING), "siglip": loop_siglip}
CASES = {
    "distinct": pairs(6),
    "shared positives": pairs(7, ids=[0, 1, 0, 3, 1, 0, 6]),
    "invalid rows": pairs(6, valid=[True, False, True, True, False, True]),
    "shared and invalid": pairs(6, ids=[4, 4, 2, 4, 2, 5], valid=[True, False, True, True, True, True]),
    "all belong together": pairs(4, ids=[9, 9, 9, 9]),
    "one valid row": pairs(3, valid=[False, True, False]),
}
every_loss = pytest.mark.parametrize(("name", "duplicates"), list(product(NAMES, ("share", "mask"))))


def autograd(loss_of: Callable[..., Tensor], p: Pairs, log_scale: float, bias: float) -> tuple[Tensor, ...]:
    """Loss and its gradients in image, text, logit_scale and logit_bias."""
    leaves = [t.clone().requires_grad_() for t in (p.image, p.text, double(log_scale), double(bias))]
    loss = loss_of(Pairs(leaves[0], leaves[1], p.ids, p.valid), leaves[2].exp(), leaves[3])
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *found


def parts(found: LocalGradients) -> tuple[Tensor, ...]:
    return found.loss, found.image, found.text, found.log_scale, found.bias


def alone(loss: Loss, p: Pairs, scale: float, bias: float = -2.0) -> LocalGradients:
    """The loss on one rank."""
    return loss(p, p, p.image.new_tensor(scale), p.image.new_tensor(bias), lambda rows: rows)


def on_parts(loss: Loss, whole: Pairs, slices: list[slice], scale: float, bias: float) -> list[LocalGradients]:
    """The loss on ranks that hold these slices; a thread each, that meet where they gather."""
    gathered: list[Tensor] = [torch.empty(0)] * len(slices)
    meet = Barrier(len(slices))

    def on(r: int) -> LocalGradients:
        def gather(rows: Tensor) -> Tensor:
            gathered[r] = rows
            meet.wait(10)
            return torch.cat(gathered)

        part = slices[r]
        local = Pairs(whole.image[part], whole.text[part], whole.ids[part], whole.valid[part], start=part.start)
        return loss(local, whole, double(scale), double(bias), gather)

    with ThreadPoolExecutor(len(slices)) as threads:
        return list(threads.map(on, range(len(slices))))


@every_loss
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("log_scale", [0.0, 2.659, 4.605])
def test_a_loss_is_its_definition_in_value_and_gradients(name, duplicates, case, log_scale):
    p = CASES[case]
    expected = autograd(lambda q, scale, bias: LOOPS[name](q, scale, bias, duplicates), p, log_scale, -2.0)
    assert_close(parts(alone(make_loss(name, duplicates), p, math.exp(log_scale))), expected)


@pytest.mark.parametrize("duplicates", ["share", "mask"])
def test_info_nce_of_distinct_pairs_is_open_clips_loss(duplicates):
    from open_clip.loss import ClipLoss

    p = pairs(9)
    expected = autograd(lambda q, scale, bias: ClipLoss()(q.image, q.text, scale, bias), p, 2.0, -2.0)
    assert_close(parts(alone(build_loss("clip", duplicates), p, math.exp(2))), expected)


@pytest.mark.parametrize("duplicates", ["share", "mask"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_of_distinct_pairs_is_torchs(duplicates, smoothing):
    def of_torch(q: Pairs, scale: Tensor, bias: Tensor) -> Tensor:
        logits, labels = scale * q.image @ q.text.T, torch.arange(len(q.ids))
        sides = [F.cross_entropy(side, labels, label_smoothing=smoothing) for side in (logits, logits.T)]
        return torch.stack(sides).mean()

    p = pairs(9)
    expected = autograd(of_torch, p, 2.0, -2.0)
    assert_close(parts(alone(build_loss("clip", duplicates, smoothing), p, math.exp(2))), expected)


@pytest.mark.parametrize("duplicates", ["share", "mask"])
def test_siglip_of_distinct_pairs_is_open_clips_loss(duplicates):
    from open_clip.loss import SigLipLoss

    p = pairs(9)
    expected = autograd(lambda q, scale, bias: SigLipLoss()(q.image, q.text, scale, bias), p, 2.0, -2.0)
    assert_close(parts(alone(build_loss("siglip", duplicates), p, math.exp(2))), expected)


@every_loss
@pytest.mark.parametrize("case", ["shared positives", "shared and invalid"])
def test_the_parts_of_ranks_are_rows_and_summands_of_the_whole(name, duplicates, case):
    loss, whole = make_loss(name, duplicates), CASES[case]
    expected = alone(loss, whole, 10.0)
    found = on_parts(loss, whole, [slice(0, 2), slice(2, 3), slice(3, len(whole.ids))], 10.0, -2.0)
    assert_close(torch.cat([part.image for part in found]), expected.image)
    assert_close(torch.cat([part.text for part in found]), expected.text)
    for field in ("loss", "log_scale", "bias", "shared"):
        assert_close(torch.stack([getattr(part, field) for part in found]).sum(), getattr(expected, field))


@every_loss
def test_tiles_do_not_change_the_result(name, duplicates, monkeypatch):
    loss, p = make_loss(name, duplicates), pairs(200, ids=[i // 3 for i in range(200)])
    whole = alone(loss, p, 20.0)
    monkeypatch.setattr(losses, "TILE_ELEMENTS", 1)  # the narrowest tiles: 64 columns
    assert_close(parts(alone(loss, p, 20.0)), parts(whole))


@every_loss
def test_shared_counts_the_rows_with_several_valid_positives(name, duplicates):
    p = CASES["shared and invalid"]
    expected = sum(
        any(i != j and p.valid[j] and p.ids[i] == p.ids[j] for j in range(6)) for i in range(6) if p.valid[i]
    )
    assert alone(make_loss(name, duplicates), p, 1.0).shared == expected == 4


@every_loss
def test_a_batch_without_valid_pairs_has_no_loss_and_no_gradient(name, duplicates):
    found = alone(make_loss(name, duplicates), pairs(3, valid=[False] * 3), 5.0)
    assert not any(part.any() for part in parts(found)) and found.shared == 0


@every_loss
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_without_finite_features_are_named_and_spoil_the_loss(name, duplicates, bad):
    p = pairs(4)
    p.text[2, 5] = bad
    found = alone(make_loss(name, duplicates), p, 5.0)
    assert found.finite.tolist() == [True, True, False, True] and not found.loss.isfinite()


@pytest.mark.parametrize(("name", "duplicates"), [("triplet", "share"), ("clip", "drop")])
def test_an_unknown_loss_is_refused_with_those_there_are(name, duplicates):
    with pytest.raises(ValueError, match=r"loss\.(name='triplet'.*clip.*siglip|duplicates='drop'.*share.*mask)"):
        build_loss(name, duplicates)
    with pytest.raises(ValueError, match=r"loss\.label_smoothing=0\.1 would be ignored"):
        build_loss("siglip", "share", 0.1)


def test_the_start_of_a_sigmoid_loss_says_of_each_pair_what_the_softmax_said():
    """exp(s) / (exp(s) + sum of the others') is the sigmoid of s less the logarithm of that sum."""
    p, scale = pairs(7), double(5.0)
    logits = scale * p.image @ p.text.T
    others = logits.masked_fill(torch.eye(7, dtype=torch.bool), -torch.inf)
    sums = [others.logsumexp(dim=1), others.logsumexp(dim=0)]
    assert_close((logits.diagonal() - sums[0]).sigmoid(), logits.softmax(dim=1).diagonal())
    assert_close(bias_of_softmax(p, scale), -torch.cat(sums).mean())


def test_that_start_leaves_out_positives_and_what_is_not_valid_and_is_the_log_odds_where_nothing_is_known():
    p = CASES["shared and invalid"]
    rows = [i for i in range(6) if p.valid[i]]
    logits, found = double(3.0) * p.image @ p.text.T, []
    for side in (logits, logits.T):
        for i in rows:
            others = [side[i, j] for j in rows if p.ids[j] != p.ids[i]]
            found.append(torch.stack(others).logsumexp(0))
    assert_close(bias_of_softmax(p, double(3.0)), -torch.stack(found).mean())
    assert_close(bias_of_softmax(pairs(9), double(0.0)), double(-math.log(8)))


def test_scores_of_identical_features_at_the_largest_scale_stay_finite():
    same = F.normalize(torch.ones(4, 8), dim=1)
    p = Pairs(same, same, torch.arange(4), torch.ones(4, dtype=torch.bool))
    for name, expected in (("clip", torch.tensor(4.0).log()), ("siglip", torch.tensor(3 * 98.0))):
        found = alone(build_loss(name, "share"), p, 100.0)
        assert_close(found.loss, expected)
        assert all(torch.isfinite(part).all() for part in parts(found))


@every_loss
def test_every_case_has_both_directions(name, duplicates):
    """Swapping the sides swaps the gradients and leaves the loss."""
    loss = make_loss(name, duplicates)
    for p, scale in product(CASES.values(), (1.0, 30.0)):
        one, other = alone(loss, p, scale), alone(loss, Pairs(p.text, p.image, p.ids, p.valid), scale)
        assert_close((one.loss, one.image, one.text), (other.loss, other.text, other.image))


def share_of(batch: int, world: int = 64) -> tuple[Pairs, Pairs]:
    """The first rank's pairs of a batch in which every other pair belongs to the one before, and all of them."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, 8, generator=generator), dim=1) for _ in range(2))
    everyone = Pairs(image, text, torch.arange(batch) // 2, torch.ones(batch, dtype=torch.bool))
    rows = slice(0, batch // world)
    return Pairs(image[rows], text[rows], everyone.ids[rows], everyone.valid[rows]), everyone


def naive(local: Pairs, everyone: Pairs, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The sigmoid loss of the local images from one matrix of scores, by autograd."""
    image, text = (t.clone().requires_grad_() for t in (local.image, everyone.text))
    sign = 2.0 * (local.ids[:, None] == everyone.ids) - 1
    return torch.autograd.grad(-F.logsigmoid(sign * (scale * image @ text.T + bias)).sum(), (image, text))


def peak_of(loss: Callable[[Pairs, Pairs], object], batch: int) -> int:
    local, everyone = share_of(batch)
    return peak_bytes(lambda: loss(local, everyone), torch.device("cpu"))


def growth(sizes: list[int], peaks: list[int]) -> float:
    """Slope of the line nearest to log(peak) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(peaks), 1)[0])


@pytest.mark.process  # no processes, but 67 million scores in both directions
@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_with_the_batch_and_not_with_its_square(name):
    scale, bias, loss = torch.tensor(10.0), torch.tensor(-10.0), make_loss(name, "mask")
    sizes, few = [1 << k for k in range(10, 17)], [1 << k for k in range(10, 14)]

    def ours(local: Pairs, everyone: Pairs) -> LocalGradients:
        missing = len(everyone.ids) - len(local.ids)
        return loss(local, everyone, scale, bias, lambda rows: F.pad(rows, (0, 0, 0, missing)))

    dense = [peak_of(lambda local, everyone: naive(local, everyone, scale, bias), size) for size in few]
    peaks = [peak_of(ours, size) for size in sizes]
    assert growth(few, dense) > 1.9
    assert growth(sizes, peaks) <= 1.1
    assert growth(sizes[4:], peaks[4:]) <= 0.2  # tiles are full from 8k on: the rest is log-sum-exps and counts
