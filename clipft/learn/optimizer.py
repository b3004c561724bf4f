"""OptimConfig -> an optimizer over what is trained: fused AdamW, or one of timm's."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipft.config import ADAMW, OF_ADAMW, OptimConfig
from clipft.learn.nested import size_of
from clipft.learn.optimizer_names import optimizers
from clipft.model.groups import groups_of

PROBE = 64  # side of the matrix on which an optimizer's state is counted


def build_optimizer(
    model: nn.Module, config: OptimConfig, lr: float, multipliers: Mapping[str, float]
) -> torch.optim.Optimizer:
    """`lr` is the peak; before each step a group's rate is set to that of the step times its `lr_mult`."""
    optimizer = make_optimizer(config, lr, parameter_groups(model, config, multipliers))
    set_options(optimizer, config, lr)
    return optimizer


def parameter_groups(model: nn.Module, config: OptimConfig, multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
    """What is trained, by share of the rate and weight decay, which vectors do not have; parameters with their names.

    Muon is for what maps features to features: it leaves embeddings (and by itself vectors) to an AdamW of its own.
    """
    muon = optimizers()[config.name].class_name == "Muon"
    embeddings = {name for name, group in groups_of(model).items() if group.part == "embed"} if muon else set()
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            multiplier, matrix, embedding = multipliers[name], parameter.ndim >= 2, name in embeddings
            new = {"params": [], "lr_mult": multiplier, "weight_decay": config.weight_decay if matrix else 0.0}
            new |= {"use_fallback": True} if embedding else {}
            groups.setdefault((multiplier, matrix, embedding), new)["params"].append((name, parameter))
    return list(groups.values())


def make_optimizer(config: OptimConfig, lr: float, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings = {key: getattr(config, key) for key in ("beta1", "beta2", "eps", "momentum")}
    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    given = OF_ADAMW | given if config.name == ADAMW else given
    if "beta1" in given:
        given["betas"] = given.pop("beta1"), given.pop("beta2")
    if config.name == ADAMW:  # on a CPU 7 times as fast as the loop over parameters, on a GPU one kernel
        return torch.optim.AdamW(groups, lr=lr, fused=True, **given)
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

    given |= {"fused": True} if optimizers()[config.name].class_name == "Adam" else {}
    return create_optimizer_v2(groups, config.name, lr=lr, weight_decay=config.weight_decay, **given)


def set_options(optimizer: torch.optim.Optimizer, config: OptimConfig, lr: float) -> None:
    """What the config says, also where a state that was loaded had been saved under another one."""
    for group in optimizer.param_groups:
        group |= {key: optimizer.defaults[key] for key in ("betas", "eps", "momentum") if key in group}
        group["weight_decay"] = config.weight_decay if group["params"][0].ndim >= 2 else 0.0
        if "max_lr_snapshot" in group:  # of timm's corrected decay, lr² / peak
            group["max_lr_snapshot"] = lr * group["lr_mult"]


def trained_by(config: OptimConfig, groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a saved state has to fit: the optimizer's name, and those of the parameters in each of its groups."""
    return {"name": config.name, "groups": [[name for name, _ in group["params"]] for group in groups]}


def check_trained_by(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises where the moments in a saved state are not those of this optimizer and what it trains (resume=force)."""
    if before == now:
        return
    changes = [f"optim.name {before['name']} -> {now['name']}"] if before["name"] != now["name"] else []
    then, today = ({name for names in of["groups"] for name in names} for of in (before, now))
    changes += [f"{name} is no longer trained" for name in sorted(then - today)[:2]]
    changes += [f"{name} is now trained" for name in sorted(today - then)[:2]]
    changes = changes or ["parameters share their rates in other groups"]
    raise ValueError(
        f"{folder} cannot go on under this config: the optimizer's saved state does not fit ({', '.join(changes)}). "
        f"Train from its weights in a new run with model={folder} name=OTHER, or begin again with resume=restart."
    )


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it leaves everything as it is where its `found_inf` is 1, on the device and without anybody waiting."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def state_per_weight(config: OptimConfig) -> float:
    """What the optimizer keeps for each trained weight, in values of its size, measured on a small matrix."""
    weight = nn.Parameter(torch.ones(PROBE, PROBE))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer(config, 1e-3, [{"params": [weight]}])
    optimizer.step()
    return round(size_of(list(optimizer.state.values())) / weight.nbytes, 1)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Global 2-norm of the gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
