"""The learning rate as a pure function of the step."""

import math


def lr_at(step: int, num_steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """Rate of the 0-based `step`: linear to `peak` over `warmup_steps`, then a cosine towards zero, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
