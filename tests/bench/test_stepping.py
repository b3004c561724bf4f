"""bench step: the loops do the same maths, and what they take is counted."""

from collections import Counter
from functools import partial
from random import Random

import pytest
import torch
from open_clip import ClipLoss
from torch import nn

from clipft.bench import stepping
from clipft.bench.overhead import WARM_UP, in_turns, overhead
from clipft.bench.stepping import bare_step, bench_step, loop, place, plain, plain_with_our_encoders, step_clock

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # in Lightning


@pytest.fixture
def resident():
    torch.manual_seed(0)
    return place("tiny", 4, CPU, "32-true")


def weights(resident) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in resident.clip.model.state_dict().items()}


def test_a_batch_lies_on_the_device_with_captions_cut_and_whole(resident):
    assert resident.batch.pixels.dtype == torch.uint8 and resident.size == 4
    assert resident.full_tokens.shape[1] > resident.batch.tokens.shape[1]
    assert torch.equal(resident.full_tokens[:, : resident.batch.tokens.shape[1]], resident.batch.tokens)


@pytest.mark.parametrize("run", [plain, plain_with_our_encoders, stepping.ours])
def test_every_loop_steps_as_often_as_it_is_timed(resident, run):
    before = weights(resident)
    seconds = run(resident, 2)
    assert len(seconds) == 2 and min(seconds) > 0
    after = weights(resident)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_our_encoders_change_the_speed_of_the_loop_and_not_what_it_learns():
    """From the same weights and without dropout, three steps take both to the same loss."""
    found = []
    for run in (plain, plain_with_our_encoders):
        resident = place("tiny", 4, CPU, "32-true")
        start = loss_of(resident)
        resident.clip.model.eval()
        run(resident, 1)
        found.append(start - loss_of(resident))
    assert found[0] > 1e-3 and found[1] == pytest.approx(found[0], rel=0.01)


def loss_of(resident) -> float:
    model = resident.clip.model.eval()
    with torch.no_grad():
        image = model.encode_image(resident.pixels, normalize=True)
        loss = ClipLoss()(image, model.encode_text(resident.full_tokens, normalize=True), model.logit_scale.exp())
    model.train()
    return float(loss)


def test_a_row_for_each_loop_with_counted_flops(resident):
    rows = {row["what"]: row for row in bench_step(resident, steps=1, rounds=1)}
    assert list(rows) == ["ours", "plain loop", "plain loop, our encoders"]
    assert all(row["samples/s"] == pytest.approx(4000 / row["ms a step"]) for row in rows.values())
    assert rows["plain loop"]["speed-up over plain"].median == 1
    counted = [rows[name]["TFLOP a step"] for name in ("ours", "plain loop, our encoders", "plain loop")]
    assert counted[0] == pytest.approx(counted[1], rel=0.01) and counted[1] < counted[2]  # cut captions
    assert all("MFU" not in row and row["peak MB"] > 0 for row in rows.values())


def test_overhead_is_a_difference_of_medians_in_milliseconds(resident):
    before = weights(resident)
    rows = overhead(resident, steps=2, rounds=2)
    assert [row["what"].split(": ")[1] for row in rows] == [
        "ours beyond plain loop",
        "ours beyond plain loop, our encoders",
        "that loop beyond itself",
    ]
    for row in rows:
        assert row["ms beyond"].min <= row["ms beyond"].median <= row["ms beyond"].max < row["ms a step"]
    after = weights(resident)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)  # each step has the same work


def test_ours_and_each_loop_take_a_step_in_every_turn(resident):
    steps = Counter()
    bare = {name: partial(steps.update, [name]) for name in ("one", "other")}
    seconds = in_turns(resident, 4, bare, Random(0))
    assert {name: len(each) for name, each in seconds.items()} == {"ours": 4, "one": 4, "other": 4}
    assert abs(steps["one"] - steps["other"]) <= 1 and steps["one"] >= 4 + WARM_UP
    assert min(seconds["ours"]) > max(seconds["one"])  # which only counts


def test_the_clock_marks_each_optimizer_step_and_only_inside_its_block():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with step_clock(CPU) as clock:
        for _ in range(4):
            optimizer.step()
    optimizer.step()
    assert len(clock()) == 3


def test_the_plain_loop_is_open_clips(resident):
    """Its features are those of the modules at the full context length."""
    seen = []

    def features():
        model = resident.clip.model
        image = model.encode_image(resident.pixels, normalize=True)
        seen.append(model.encode_text(resident.full_tokens, normalize=True).shape)
        return image, model.encode_text(resident.full_tokens, normalize=True)

    optimizer = torch.optim.SGD(resident.clip.model.parameters(), lr=0.0)
    loop(resident, bare_step(resident, features, optimizer), 1)
    assert len(seen) == 3
