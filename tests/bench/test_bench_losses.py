"""bench loss: both sides do the same maths; what does not fit is computed by the law that what fits obeys."""

from typing import cast

import pytest
import torch
from torch.testing import assert_close

from clipft.bench.losses import LOSSES, bench_loss, full, local, ours
from clipft.learn.losses import LocalGradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("other", [local, full])
def test_ours_and_open_clips_have_the_same_gradients(other):
    mine = cast(LocalGradients, ours(96, 96, 16, CPU)())
    image, text, scale = cast(tuple[torch.Tensor, ...], other(96, 96, 16, CPU)())
    assert_close(mine.image, image, rtol=1e-4, atol=1e-6)
    assert_close(mine.text, text, rtol=1e-4, atol=1e-6)
    assert_close(mine.log_scale, scale * 100, rtol=1e-3, atol=1e-5)  # in log scale, and in scale


def test_every_loss_is_measured_at_every_batch_and_number_of_ranks():
    rows = bench_loss([64, 128], [1, 2], 8, CPU, max_s=60.0)
    assert {(row["ranks"], row["B"], row["loss"]) for row in rows} == {
        (world, batch, name)
        for world in (1, 2)
        for batch in (64, 128)
        for name in LOSSES
        if world > 1 or name != "open_clip full"
    }
    assert all(row["how"] == "measured" and row["s"] > 0 and row["MB"] > 0 for row in rows)
    assert all(row["memory / ours"] == 1 for row in rows if row["loss"] == "ours")


def test_what_would_take_too_long_is_computed_and_marked():
    """Twice the batch: four times the time, and of a matrix of scores four times the memory."""
    rows = bench_loss([128, 256], [2], 8, CPU, max_s=0.0)
    by = {(row["loss"], row["B"]): row for row in rows}
    for name, power in (("ours", 1), ("open_clip local", 2), ("open_clip full", 2)):
        small, large = by[name, 128], by[name, 256]
        assert (small["how"], large["how"]) == ("measured", "computed")
        assert large["s"] == pytest.approx(4 * small["s"]) and large["MB"] == pytest.approx(2**power * small["MB"])


def test_the_computed_memory_is_what_is_measured():
    """Of open_clip's at batches whose matrices are most of what it holds."""
    found = {}
    for max_s in (0.0, 60.0):
        rows = bench_loss([1024, 2048], [1], 16, CPU, max_s)
        found[max_s] = next(row for row in rows if row["loss"] == "open_clip local" and row["B"] == 2048)
    assert (found[0.0]["how"], found[60.0]["how"]) == ("computed", "measured")
    assert found[0.0]["MB"] == pytest.approx(found[60.0]["MB"], rel=0.1)
