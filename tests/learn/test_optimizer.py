import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from small import MODEL_CFG
from torch import nn
from torch.testing import assert_close

from clipft.config import OptimConfig
from clipft.learn.optimizer import (
    build_optimizer,
    check_trained_by,
    gradient_norm,
    parameter_groups,
    set_options,
    state_per_weight,
    trained_by,
)
from clipft.learn.optimizer_names import check_optimizer, optimizers, why_unfit
from clipft.model.build import build

TIMM: Any = timm.optim
FIT = [name for name, takes in optimizers().items() if why_unfit(takes) is None]


def alike(model: nn.Module) -> dict[str, float]:
    return dict.fromkeys(dict(model.named_parameters()), 1.0)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decay, rest = build_optimizer(model, OptimConfig(weight_decay=0.3), 0.1, alike(model)).param_groups
    assert decay["weight_decay"] == 0.3 and [p is model[0].weight for p in decay["params"]] == [True]
    assert rest["weight_decay"] == 0 and {p.shape for p in rest["params"]} == {torch.Size([4])}
    assert len(rest["params"]) == 3


def test_a_step_is_that_of_adamw_with_these_settings():
    config = OptimConfig(weight_decay=0.2, beta1=0.8, beta2=0.95, eps=1e-3)
    ours, theirs = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config, 0.1, alike(ours))
    reference = torch.optim.AdamW(theirs.parameters(), 0.1, (0.8, 0.95), 1e-3, 0.2, foreach=False)
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, reference)):
            model.weight.grad = torch.full((3, 3), float(step + 1)).triu()
            each.step()
    assert_close(ours.weight, theirs.weight)


def test_the_norm_is_over_all_gradients():
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.tensor([4.0, 0.0])
    assert_close(gradient_norm(model.parameters()), torch.tensor(52.0).sqrt())


def test_names_and_what_they_take_are_those_of_timm():
    assert set(optimizers()) == set(TIMM.list_optimizers())
    for name, takes in optimizers().items():
        theirs = TIMM.get_optimizer_info(name)
        flags = (takes.has_eps, takes.has_momentum, takes.has_betas, takes.num_betas)
        assert flags == (theirs.has_eps, theirs.has_momentum, theirs.has_betas, theirs.num_betas), name
        assert (why_unfit(takes) is not None) == (
            isinstance(theirs.opt_class, str) or theirs.second_order or "kron" in name
        )


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "lyon"}, r"optim\.name='lyon' is unknown\. Did you mean lion"),
        ({"name": "kronw"}, "draws random numbers of its own"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"name": "bnbadamw8bit"}, "bitsandbytes"),
        ({"name": "fusedlamb"}, "apex"),
        ({"name": "lion", "eps": 1e-6}, r"optim\.eps=1e-06 would be ignored: optim\.name=lion does not take it"),
        ({"name": "lion", "momentum": 0.9}, r"optim\.momentum=0\.9 would be ignored"),
        ({"name": "lion", "beta1": 0.95}, r"optim\.beta1 and optim\.beta2 go together"),
        ({"name": "sgd", "beta2": 0.9}, r"optim\.beta2=0\.9 would be ignored"),
        ({"name": "adan", "beta1": 0.9, "beta2": 0.9}, r"optim\.beta1=0\.9 would be ignored"),
        ({"name": "adamw", "momentum": 0.9}, r"optim\.momentum=0\.9 would be ignored: optim\.name=adamw"),
        ({"name": "lion", "lr": None}, r"optim\.lr is needed with optim\.name=lion"),
    ],
)
def test_what_a_name_does_not_take_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(OptimConfig(**{"lr": 1e-4, **config}))


def test_adamw_has_clips_settings_and_the_others_their_own():
    model = nn.Linear(2, 2)

    def options(**given: Any) -> dict[str, Any]:
        return build_optimizer(model, OptimConfig(**given), 1e-3, alike(model)).param_groups[0]

    adamw = {"betas": (0.9, 0.98), "eps": 1e-6}
    assert adamw.items() <= options().items() and adamw.items() <= options(name="AdamW").items()
    assert options(beta2=0.7)["betas"] == (0.9, 0.7) and options(eps=0.1)["eps"] == 0.1
    for name in ("lion", "lamb"):
        own = TIMM.get_optimizer_class(name)([model.weight]).defaults
        assert options(name=name)["betas"] == own["betas"] and options(name=name).get("eps") == own.get("eps")
    assert options(name="lion", beta1=0.5, beta2=0.6)["betas"] == (0.5, 0.6)
    assert options(name="sgd")["momentum"] == 0.9 and options(name="sgd", momentum=0.3)["momentum"] == 0.3


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build("small", MODEL_CFG, {}).model


def shares(model: nn.Module) -> dict[str, float]:
    """A share of the rate for each tower; one block is frozen."""
    model.visual.transformer.requires_grad_(False)  # pyright: ignore
    return {name: 0.5 if name.startswith("visual.") else 1.0 for name, _ in model.named_parameters()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step on gradients that follow from its number, at a rate that follows from it too."""
    draw = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        gradient = 0.1 * torch.randn(parameter.shape, generator=draw)
        parameter.grad = gradient if parameter.requires_grad else None
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 / (number + 1) * group["lr_mult"]
    torch.manual_seed(number + len(optimizer.state))  # another one after a resume
    optimizer.step()


@pytest.mark.parametrize("name", FIT)
def test_an_optimizer_goes_on_bit_for_bit_from_a_state_that_was_saved_without_pickle(name, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's and torch's own deprecations
        config, one = OptimConfig(name=name, lr=1e-3), copy.deepcopy(model)
        multipliers = shares(one)
        before = copy.deepcopy(one.state_dict())
        optimizer = build_optimizer(one, config, 1e-3, multipliers)
        for number in range(3):
            step(one, optimizer, number)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(one)
        resumed = build_optimizer(other, config, 1e-3, multipliers)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        set_options(resumed, config, 1e-3)
        for number in range(3, 6):
            step(one, optimizer, number)
            step(other, resumed, number)
    for key, value in one.named_parameters():
        assert torch.equal(value, dict(other.named_parameters())[key]) and value.isfinite().all(), key
        assert torch.equal(value, before[key]) != value.requires_grad, key


def test_muon_leaves_embeddings_to_its_adamw(model):
    one = copy.deepcopy(model)
    groups = build_optimizer(one, OptimConfig(name="muon", lr=1e-3), 1e-3, alike(one)).param_groups
    alone = {name for group in groups if group.get("use_fallback") for name in group["param_names"]}
    tables = {"token_embedding.weight", "positional_embedding", "visual.positional_embedding", "visual.conv1.weight"}
    assert tables <= alone and not any("resblocks" in name or "proj" in name for name in alone)


def test_corrected_decay_knows_the_peak_of_each_group():
    model = nn.Linear(2, 2)
    groups = build_optimizer(model, OptimConfig(name="adamc"), 1e-3, {"weight": 0.5, "bias": 1.0}).param_groups
    assert {group["lr_mult"]: group["max_lr_snapshot"] for group in groups} == {0.5: 5e-4, 1.0: 1e-3}


def test_settings_of_the_config_go_before_those_of_a_loaded_state():
    model = nn.Linear(2, 2)
    saved = build_optimizer(model, OptimConfig(weight_decay=0.1, eps=1e-3), 1e-3, alike(model)).state_dict()
    config = OptimConfig(weight_decay=0.7, eps=1e-4)
    optimizer = build_optimizer(model, config, 1e-3, alike(model))
    optimizer.load_state_dict(saved)
    set_options(optimizer, config, 1e-3)
    assert [(group["weight_decay"], group["eps"]) for group in optimizer.param_groups] == [(0.7, 1e-4), (0.0, 1e-4)]


@pytest.mark.parametrize(
    "name, values", [("adamw", 2), ("lion", 1), ("sgd", 1), ("adan", 4), ("lamb", 2), ("adafactorbv", 0.5)]
)
def test_state_is_counted_by_weight(name, values):
    assert state_per_weight(OptimConfig(name=name)) == values


def test_a_state_that_another_optimizer_or_other_parameters_left_is_refused():
    model = nn.Linear(2, 2)

    def now(name: str, share: float = 1.0) -> dict[str, Any]:
        return trained_by(
            OptimConfig(name=name), parameter_groups(model, OptimConfig(name=name), {"weight": share, "bias": 1})
        )

    before = now("adamw")
    check_trained_by(Path("runs/a"), before, now("adamw", share=0.5))
    with pytest.raises(
        ValueError, match=r"runs/a cannot go on .*adamw -> lion.*model=runs/a name=OTHER.*resume=restart"
    ):
        check_trained_by(Path("runs/a"), before, now("lion"))
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="weight is no longer trained"):
        check_trained_by(Path("runs/a"), before, now("adamw"))
