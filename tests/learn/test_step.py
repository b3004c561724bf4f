import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipft.data.loader import Batch
from clipft.data.order import rank_slice
from clipft.learn.gather import gather_known_rows, gather_rows, rank, world
from clipft.learn.losses import LOSSES, LocalGradients, Pairs, build_loss
from clipft.learn.step import Tower, Towers, contrastive_backward, gather_pairs
from clipft.model.build import build_model
from clipft.model.encode import encode_image, encode_text, to_float
from clipft.model.names import architecture_cfg

BATCH = 11
KINDS = [("clip", "share"), ("clip", "mask"), ("siglip", "share"), ("siglip", "mask"), ("smoothed", "mask")]
SMOOTHING = {"smoothed": 0.2}  # loss.label_smoothing of clip
every_loss = pytest.mark.parametrize(("name", "duplicates"), KINDS)


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Embedding(50, 16), nn.Dropout(dropout), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, batch: Batch) -> Tensor:
        return F.normalize(self.image(batch.pixels.flatten(1).to(self.logit_scale.dtype) / 255), dim=1)

    def encode_text(self, batch: Batch) -> Tensor:
        return F.normalize(self.text(batch.tokens).mean(dim=1), dim=1)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.encode_image(batch), self.encode_text(batch)


@dataclass(frozen=True)
class Case:
    """A model with our way to encode and one for the oracle, which takes the model in float64."""

    model: nn.Module
    towers: Towers
    encode_plainly: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    batch: Batch


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work()


def make_batch(size: int = 2, tokens: Tensor | None = None) -> Batch:
    """11 pairs of noise, two of them not valid, two groups of ids that belong together."""
    draw = np.random.default_rng(1)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[[3, 8]] = False
    return Batch(
        pixels=torch.from_numpy(draw.integers(0, 256, (BATCH, 3, size, size), np.uint8)),
        tokens=torch.from_numpy(draw.integers(0, 50, (BATCH, 5))) if tokens is None else tokens,
        valid=valid,
        ids=torch.tensor([0, 1, 2, -4, 0, 5, 6, 1, -9, 0, 10]),
        keys=[str(i) for i in range(BATCH)],
        bad={},
    )


def small_case(dropout: float = 0.0) -> Case:
    model = Model(dropout)
    return Case(model, Towers(Tower(model.encode_image), Tower(model.encode_text)), Model.encode, make_batch())


def clip_case(model_cfg: dict) -> Case:
    """A CLIP of open_clip; the oracle encodes with open_clip's own methods, which do not cut captions."""
    torch.manual_seed(0)
    model = build_model({**model_cfg, "init_logit_bias": -3.0}).train()
    length, end = model.context_length, model_cfg["text_cfg"]["vocab_size"] - 1
    tokens = torch.zeros(BATCH, length, dtype=torch.long)
    for i, row in enumerate(tokens):
        stop = 2 + i % (length - 5)
        row[:stop] = torch.randint(1, end, (stop,))
        row[stop] = end

    def image(batch: Batch) -> Tensor:
        return encode_image(model, to_float(batch.pixels, [0.5] * 3, [0.25] * 3))

    def text(batch: Batch) -> Tensor:
        return encode_text(model, batch.tokens, trim=True)

    def encode_plainly(wide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels = to_float(batch.pixels, [0.5] * 3, [0.25] * 3).double()
        return wide.encode_image(pixels, normalize=True), wide.encode_text(batch.tokens, normalize=True)

    return Case(
        model, Towers(Tower(image), Tower(text)), encode_plainly, make_batch(model.visual.image_size[0], tokens)
    )


def dense_loss(
    image: Tensor, text: Tensor, ids: Tensor, scale: Tensor, bias: Tensor, name: str, duplicates: str
) -> Tensor:
    """The losses from their definition, on one matrix of scores."""
    itself, same = torch.eye(len(ids), dtype=torch.bool), ids[:, None] == ids
    positive, counted = (itself, ~same | itself) if duplicates == "mask" else (same, same | True)
    logits = scale * image @ text.T + bias
    if name == "siglip":
        signs = torch.where(positive, 1, -1)
        return -F.logsigmoid(signs * logits)[counted].sum() / len(ids)
    logits, share = logits.masked_fill(~counted, -torch.inf), SMOOTHING.get(name, 0.0)
    target = (1 - share) * positive / positive.sum(1, keepdim=True) + share * counted / counted.sum(1, keepdim=True)
    both = logits.log_softmax(1) + logits.T.log_softmax(1)
    return -(target * both.masked_fill(~counted, 0)).sum() / (2 * len(ids))


def rounded(features: Tensor) -> Tensor:
    """The features as bf16 has them; their gradient passes as it is."""
    return features + (features.detach().bfloat16() - features.detach()).to(features.dtype)


def whole_batch_gradients(
    case: Case, name: str, duplicates: str, change: Callable[[Tensor], Tensor] = lambda features: features
) -> dict[str, Tensor]:
    """Plain autograd on the joined batch in float64, invalid rows cut out afterwards."""
    model, valid = copy.deepcopy(case.model).double(), case.batch.valid
    scale, bias = scale_and_bias(model, name)
    image, text = (change(side[valid]) for side in case.encode_plainly(model, case.batch))
    loss = dense_loss(image, text, case.batch.ids[valid], scale.exp(), bias, name, duplicates)
    loss.backward()
    return {name: value.float() for name, value in {"loss": loss.detach(), **gradients(model)}.items()}


def scale_and_bias(model: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters of the loss; the bias is frozen where the loss does not see it."""
    scale, bias = model.logit_scale, model.logit_bias
    assert isinstance(scale, nn.Parameter) and isinstance(bias, nn.Parameter)
    bias.requires_grad_(name == "siglip")
    return scale, bias


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def step_gradients(
    case: Case, name: str, duplicates: str, micro_batches: Sequence[int], gather_dtype: torch.dtype | None = None
) -> list[dict[str, Tensor]]:
    """Gradients after steps of ours on this rank's slice, under DDP where there are ranks."""
    scale_and_bias(case.model, name)  # before DDP looks at what is trained
    wrapped = DistributedDataParallel(Wrapped(case.model)) if dist.is_initialized() else None

    def step(micro_batch: int) -> dict[str, Tensor]:
        case.model.zero_grad()
        backward = prepared_backward(wrapped)
        local = own_step(case, wrapped, name, duplicates, micro_batch, backward, gather_dtype=gather_dtype)
        return {"loss": gather_rows(local.loss[None]).sum(), **gradients(case.model)}

    return [step(micro_batch) for micro_batch in micro_batches]


def own_step(
    case: Case,
    wrapped: DistributedDataParallel | None,
    name: str,
    duplicates: str,
    micro_batch: int,
    backward: Callable[[Tensor], None],
    with_ids: bool = True,
    gather_dtype: torch.dtype | None = None,
) -> LocalGradients:
    """A step of ours on this rank's slice."""
    scale, bias = scale_and_bias(case.model, name)

    def work() -> LocalGradients:
        return contrastive_backward(
            case.towers,
            scale,
            bias,
            case.batch._rows(rank_slice(BATCH, rank(), world())),
            loss=build_loss("clip" if name in SMOOTHING else name, duplicates, SMOOTHING.get(name, 0.0)),
            with_ids=with_ids,
            gather_dtype=gather_dtype,
            batch_size=BATCH,
            micro_batch=micro_batch,
            seed=(0, 0),
            backward=backward,
            no_sync=wrapped.no_sync if wrapped else nullcontext,
        )

    return inside_forward(wrapped, work) if wrapped else work()


def inside_forward(wrapped: DistributedDataParallel, work: Callable[[], LocalGradients]) -> LocalGradients:
    """work() where Lightning calls training_step: DDP's forward, which must not await a backward after it."""

    def then_await_nothing() -> LocalGradients:
        found = work()
        wrapped.require_backward_grad_sync = False
        return found

    found = wrapped(then_await_nothing)
    wrapped.require_backward_grad_sync = True
    return found


def prepared_backward(wrapped: DistributedDataParallel | None):
    """What Lightning's manual_backward does: tells DDP's reducer about this backward before it starts."""

    def backward(loss: Tensor) -> None:
        if wrapped is not None and wrapped.require_backward_grad_sync:
            wrapped.reducer.prepare_for_backward([])
        loss.backward()

    return backward


def differences(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each parameter's difference over the norm of its gradient.

    The gradient of an attention's key bias is zero but for rounding, so it is judged by the whole bias's.
    """
    assert ours.keys() == expected.keys() and "logit_scale" in ours
    found = {}
    for name, value in expected.items():
        difference, size = ours[name] - value, value.norm()
        if name.endswith("in_proj_bias"):
            for part, third, own in zip("qkv", difference.chunk(3), value.chunk(3), strict=True):
                found[f"{name}.{part}"] = float(third.norm() / (size if part == "k" else own.norm()))
        else:
            found[name] = float(difference.norm() / size)
    return found


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = {name: value for name, value in differences(ours, expected).items() if not value < 1e-5}
    assert not wrong


@every_loss
def test_micro_batches_give_the_gradients_of_the_whole_batch(name, duplicates):
    expected = whole_batch_gradients(small_case(), name, duplicates)
    assert ("logit_bias" in expected) == (name == "siglip")
    for ours in step_gradients(small_case(), name, duplicates, [1, 2, 5, 11, 100]):
        assert_same(ours, expected)


@every_loss
def test_scores_and_what_is_made_of_them_are_fp32_under_autocast(name, duplicates):
    case = small_case()

    def wide(tower: Tower) -> Tower:
        return Tower(torch.autocast("cpu", enabled=False)(tower.encode))

    (expected,) = step_gradients(case, name, duplicates, [4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        towers = Towers(wide(case.towers.image), wide(case.towers.text))
        (found,) = step_gradients(replace(case, towers=towers), name, duplicates, [4])
    above = (
        "loss",
        "logit_scale",
        "logit_bias",
        "image.3.bias",
        "text.2.bias",
    )  # no matrix product of the towers' in it
    assert all(torch.equal(found[key], expected[key]) for key in above if key in expected)


WIDE = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 64, "patch_size": 32, "width": 768, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 1000, "width": 512, "heads": 8, "layers": 2},
}
MICRO_BATCHES = [1, 2, 5]  # of 11, 6, 5, 3 and 2 pairs: with uneven last ones and without


@pytest.fixture(scope="module")
def clips() -> list[tuple[Case, dict[tuple[str, str], dict[str, Tensor]]]]:
    """Models with the gradients of their losses, made before ranks are forked."""
    cases = [(clip_case(architecture_cfg("tiny")), KINDS), (clip_case(WIDE), [KINDS[0], KINDS[3]])]
    return [(case, {kind: whole_batch_gradients(case, *kind) for kind in kinds}) for case, kinds in cases]


def all_differences(clips) -> list[dict[str, float]]:
    """Differences of the parameters, for every model, loss and micro-batch."""
    return [
        differences(ours, expected)
        for case, expected_of in clips
        for (name, duplicates), expected in expected_of.items()
        for ours in step_gradients(case, name, duplicates, MICRO_BATCHES)
    ]


@dataclass
class Seen:
    """What a frozen tower was asked for."""

    calls: int = 0
    with_graph: bool = False


def freeze_tower(case: Case, side: str) -> tuple[Case, Seen]:
    """The case with one tower frozen, as clipft.model.tune and the step treat it, and what that tower is asked for."""
    seen, tower = Seen(), getattr(case.towers, side)
    for name, parameter in case.model.named_parameters():
        image = name.startswith(("visual.", "image."))
        parameter.requires_grad_("logit" in name or image != (side == "image"))

    def encode(batch: Batch) -> Tensor:
        seen.calls += 1
        seen.with_graph |= torch.is_grad_enabled()
        return tower.encode(batch)

    return replace(case, towers=replace(case.towers, **{side: Tower(encode, trained=False)})), seen


@every_loss
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_is_encoded_once_without_graph_and_leaves_the_gradients_of_the_other(name, duplicates, side):
    for micro_batch in (2, 5, 11):
        case, seen = freeze_tower(small_case(), side)
        expected = whole_batch_gradients(case, name, duplicates)
        assert not any(key.startswith(f"{side}.") for key in expected) and len(expected) > 3
        (ours,) = step_gradients(case, name, duplicates, [micro_batch])
        assert_same(ours, expected)
        assert seen.calls == -(-BATCH // micro_batch) and not seen.with_graph


def test_two_frozen_towers_leave_the_scale_to_be_trained():
    case, _ = freeze_tower(small_case(), "image")
    both, seen = freeze_tower(case, "text")
    for name, parameter in both.model.named_parameters():
        parameter.requires_grad_("logit" in name)
    expected = whole_batch_gradients(both, "siglip", "share")
    (ours,) = step_gradients(both, "siglip", "share", [3])
    assert_same(ours, expected)
    assert set(expected) == {"loss", "logit_scale", "logit_bias"} and seen.calls == 4


def differences_when_frozen(cases: list[tuple[Case, dict[str, Tensor]]]) -> list[dict[str, float]]:
    """Differences of what is trained beside a frozen tower, for each of the micro-batches."""
    return [
        differences(ours, expected)
        for case, expected in cases
        for ours in step_gradients(case, "siglip", "share", MICRO_BATCHES)
    ]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:Grad strides")
def test_two_ranks_with_a_frozen_tower_give_the_gradients_of_one_process(tmp_path):
    cases = [freeze_tower(clip_case(architecture_cfg("tiny")), side)[0] for side in ("image", "text")]
    expected = [(case, whole_batch_gradients(case, "siglip", "share")) for case in cases]
    for found in on_ranks(2, tmp_path, differences_when_frozen, expected):
        assert len(found) == 2 * len(MICRO_BATCHES)
        assert all(value < 1e-5 for each in found for value in each.values()), found


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:Grad strides")  # of 1x1 convolutions, as DDP finds them; about speed only
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_give_the_gradients_of_one_process_on_the_joined_batch(tmp_path, num_ranks, clips):
    for found in on_ranks(num_ranks, tmp_path, all_differences, clips):
        assert len(found) == (len(KINDS) + 2) * len(MICRO_BATCHES)
        assert all(value < 1e-5 for each in found for value in each.values()), found


def test_both_passes_of_a_micro_batch_drop_the_same_units():
    """The loss's gradient belongs to the features of the first pass: the second has to be at the same point."""
    case, seen = small_case(dropout=0.5), {"image": [], "text": []}

    def watched(side: str) -> Tower:
        def encode(batch: Batch) -> Tensor:
            features = getattr(case.towers, side).encode(batch)
            seen[side].append(features.detach())
            return features

        return Tower(encode)

    step_gradients(replace(case, towers=Towers(watched("image"), watched("text"))), "clip", "share", [4])
    for features in seen.values():
        first, second = features[:3], features[3:]
        assert len(second) == 3 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(features[0], features[1])


def differences_when_rounded(cases: list[tuple[Case, str, dict[str, Tensor]]]) -> list[dict[str, float]]:
    """Differences of the parameters when features travel in bf16, for each of the micro-batches."""
    return [
        differences(ours, expected)
        for case, name, expected in cases
        for ours in step_gradients(case, name, "share", MICRO_BATCHES, torch.bfloat16)
    ]


@pytest.fixture
def rounded_cases() -> list[tuple[Case, str, dict[str, Tensor]]]:
    """The small model is used: in it a feature that lies between two numbers of bf16 goes the same way everywhere."""
    return [(small_case(), name, whole_batch_gradients(small_case(), name, "share", rounded)) for name in LOSSES]


def test_features_in_bf16_give_the_gradients_of_the_loss_of_rounded_features(rounded_cases):
    found = differences_when_rounded(rounded_cases)
    assert len(found) == 2 * len(MICRO_BATCHES)
    assert all(value < 1e-5 for each in found for value in each.values()), found


def test_features_in_bf16_move_the_gradients_by_their_rounding_only(rounded_cases):
    """A rounded number is off by at most 2^-9 of itself, so a score by 2^-8; times the scale of e^2 that is 3 %."""
    for case, name, moved in rounded_cases:
        away = differences(moved, whole_batch_gradients(case, name, "share"))
        assert all(value < 2**-8 * math.exp(2) for value in away.values()), away
        assert max(away.values()) > 1e-4  # they did move


@pytest.mark.process
@pytest.mark.parametrize("num_ranks", [2])
def test_features_in_bf16_give_the_same_gradients_on_any_number_of_ranks(tmp_path, num_ranks, rounded_cases):
    for found in on_ranks(num_ranks, tmp_path, differences_when_rounded, rounded_cases):
        assert all(value < 1e-5 for each in found for value in each.values()), found


def gathered() -> dict[str, Tensor]:
    rows = torch.full((rank() + 1, 2), float(rank()))
    return {"unknown": gather_rows(rows), "known": gather_known_rows(rows, [1, 2, 3])}


@pytest.mark.process
def test_gathered_rows_come_in_the_order_of_ranks_whatever_their_number(tmp_path):
    expected = torch.tensor([0, 1, 1, 2, 2, 2]).float()[:, None].expand(6, 2)
    for each in on_ranks(3, tmp_path, gathered):
        assert torch.equal(each["unknown"], expected) and torch.equal(each["known"], expected)


def test_where_no_two_pairs_belong_together_their_places_are_their_ids():
    rows, valid = torch.eye(3), torch.ones(3, dtype=torch.bool)
    local = Pairs(rows, rows, torch.full((3,), 7), valid)
    mine, everyone = gather_pairs(local, [3], with_ids=False)
    assert mine.ids.tolist() == everyone.ids.tolist() == [0, 1, 2]
    mine, everyone = gather_pairs(local, [3], with_ids=True)
    assert mine.ids.tolist() == everyone.ids.tolist() == [7, 7, 7]
