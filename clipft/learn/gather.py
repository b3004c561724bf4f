"""Rows of all ranks, in rank order."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(rows: Shaped[Tensor, " b *rest"]) -> Shaped[Tensor, " B *rest"]:
    """The rows of rank 0, then of rank 1, and so on; sizes may differ. Without a graph."""
    rows = rows.detach()
    if world() == 1:
        return rows
    counts = torch.zeros(world(), dtype=torch.long, device=rows.device)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    return gather_known_rows(rows, counts.tolist())


def gather_known_rows(rows: Shaped[Tensor, " b *rest"], counts: list[int]) -> Shaped[Tensor, " B *rest"]:
    """gather_rows for sizes that every rank knows: one collective."""
    rows = rows.detach()
    if len(counts) == 1:
        return rows
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))  # all_gather_into_tensor needs equal sizes
    padded[: len(rows)] = rows
    everyone = rows.new_empty((len(counts) * longest, *rows.shape[1:]))
    dist.all_gather_into_tensor(everyone, padded)
    return torch.cat([everyone[r * longest : r * longest + count] for r, count in enumerate(counts)])


def all_objects(mine: Any) -> list[Any]:
    """What each rank brought, in the order of ranks; plain values, for rare and small things."""
    if world() == 1:
        return [mine]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, mine)
    return found
