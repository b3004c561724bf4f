"""How much fits: host memory, and the pairs that a device can encode at a time."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipft.config import Config
from clipft.learn.optimizer import state_per_weight

CGROUP = Path("/sys/fs/cgroup")
HOST_SHARE = 0.5  # of the free host memory that activations may take on a CPU; loaders and the loss need some
Try = Callable[[int], None]


def host_memory() -> float:
    """Bytes that this machine, or the container that we are in, still has to give; infinite where nobody says."""
    second = (CGROUP, "memory.max", "memory.current", "inactive_file")
    first = (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(_available(Path("/proc/meminfo")), _below_limit(*second), _below_limit(*first))


def _available(meminfo: Path) -> float:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


def _below_limit(cgroup: Path, limit: str, used: str, cache: str) -> float:
    """What the container's limit leaves; cached files count as free, since the kernel drops them first."""
    try:
        most, now = ((cgroup / name).read_text().strip() for name in (limit, used))
        if most == "max":
            return float("inf")
        lines = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0.0, float(most) - float(now) + float(lines[cache]))
    except (OSError, ValueError, KeyError):
        return float("inf")


def kept_beside(config: Config, model: nn.Module) -> int:
    """Values that a run keeps beside weights and gradients: the optimizer's and averages, of what is trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return int((state_per_weight(config.optim) + (config.train.ema is not None)) * trained)


def largest_that_fits(share: int, try_pairs: Try, device: torch.device, ranks_here: int) -> int:
    """The most pairs at a time, at most `share`, that a forward and backward pass has room for; 0 if not even one.

    On a GPU by trying. A CPU that runs out of memory gets this process killed, so there the bytes kept for the
    backward are counted on two pairs.
    """
    if device.type != "cuda":
        room = HOST_SHARE * host_memory() / ranks_here
        return int(min(share, room / bytes_per_pair(try_pairs)))
    while share and not fits(share, try_pairs):
        share //= 2
    return share


def fits(pairs: int, try_pairs: Try) -> bool:
    try:
        try_pairs(pairs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def bytes_per_pair(try_pairs: Try) -> int:
    """What one pair more keeps in memory from its forward to its backward pass."""
    counts = []
    for pairs in (1, 2):
        seen: dict[int, int] = {}

        def keep(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            try_pairs(pairs)
        counts.append(sum(seen.values()))
    return max(1, counts[1] - counts[0])


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory of the device that the work holds at a time beyond what was there, from torch's allocators."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    every: list[Any] = profile.profiler.kineto_results.events()
    events = sorted((event for event in every if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; CPU allocations raise a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
