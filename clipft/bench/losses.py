"""bench loss: time and memory of the loss and its gradients in the features, beside open_clip's ClipLoss."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clipft.bench.report import Row
from clipft.learn.losses import Pairs, build_loss
from clipft.learn.memory import is_out_of_memory, peak_bytes

SCALE = 100.0
SHORT_S, REPEATS = 1.0, 3  # what is quick is measured more than once
Work = Callable[[], object]
Build = Callable[[int, int, int, torch.device], Work]
"""b, B, D and device -> what is measured."""


def bench_loss(batches: list[int], worlds: list[int], width: int, device: torch.device, max_s: float) -> list[Row]:
    """A row for each number of ranks, batch and loss: what one rank with its b = B / W rows of B columns needs.

    What would take longer than max_s, or has no room, is computed from the largest b x B that was measured: both
    losses do work, and open_clip's holds matrices, in proportion to b B.
    """
    rows = []
    for world in worlds:
        losses = {"ours": ours, "open_clip local": local}
        if world > 1:
            losses["open_clip full"] = full
        for name, build in losses.items():
            rows += rows_of(
                name, build, [batch for batch in sorted(batches) if batch >= 2 * world], world, width, device, max_s
            )
    mine = {(row["ranks"], row["B"]): row["MB"] for row in rows if row["loss"] == "ours"}
    return [row | {"memory / ours": row["MB"] / mine[row["ranks"], row["B"]]} for row in rows]


def rows_of(
    name: str, build: Build, batches: list[int], world: int, width: int, device: torch.device, max_s: float
) -> list[Row]:
    rows: list[Row] = []
    for batch in batches:
        found = None
        if not rows or grown(rows[-1], "s", batch, 2) <= max_s:
            found = measured(build, batch // world, batch, width, device)
        how = "measured" if found else "computed"
        if found is None:
            if not rows:
                raise ValueError(f"--batches: not even {batch} has room on {device}. Give smaller ones.")
            # Ours is linear in B by the tiles; see tests/learn/test_losses.py.
            found = grown(rows[-1], "s", batch, 2), grown(rows[-1], "MB", batch, 1 if name == "ours" else 2)
        rows.append({"ranks": world, "B": batch, "loss": name, "s": found[0], "MB": found[1], "how": how})
    return rows


def grown(row: Row, key: str, batch: int, power: int) -> float:
    return row[key] * (batch / row["B"]) ** power


def measured(build: Build, b: int, batch: int, width: int, device: torch.device) -> tuple[float, float] | None:
    """Seconds and megabytes at the peak; None where there is no room."""
    try:
        work = build(b, batch, width, device)
        peak = peak_bytes(work, device)
        seconds = [clock(work, device)]
        while seconds[0] < SHORT_S and len(seconds) < REPEATS:
            seconds.append(clock(work, device))
        return sorted(seconds)[len(seconds) // 2], peak / 1e6
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def clock(work: Work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def features(batch: int, width: int, device: torch.device) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
    generator = torch.Generator(device).manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, width, generator=generator, device=device), dim=1) for _ in range(2))
    return image, text


def ours(b: int, batch: int, width: int, device: torch.device) -> Work:
    image, text = features(batch, width, device)
    everyone = Pairs(
        image, text, torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device)
    )
    local = Pairs(image[:b], text[:b], everyone.ids[:b], everyone.valid[:b])
    loss, scale, bias = build_loss("clip", "share"), torch.tensor(SCALE, device=device), torch.zeros((), device=device)
    return lambda: loss(local, everyone, scale, bias, lambda rows: F.pad(rows, (0, 0, 0, batch - b)))


def local(b: int, batch: int, width: int, device: torch.device) -> Work:
    return by_open_clip(b, batch, width, device, local_loss=True)


def full(b: int, batch: int, width: int, device: torch.device) -> Work:
    return by_open_clip(b, batch, width, device, local_loss=False)


def by_open_clip(b: int, batch: int, width: int, device: torch.device, local_loss: bool) -> Work:
    """open_clip's loss with gather_with_grad; features of the other ranks stand where its gather would bring them."""
    from open_clip import loss as module

    image, text = features(batch, width, device)
    rest = image[b:].requires_grad_(), text[b:].requires_grad_()
    mine = image[:b].clone().requires_grad_(), text[:b].clone().requires_grad_()
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    loss = module.ClipLoss(local_loss=local_loss, gather_with_grad=True, world_size=batch // b)

    def gathered(image: Tensor, text: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return torch.cat([image, rest[0]]), torch.cat([text, rest[1]])

    def work() -> tuple[Tensor, ...]:
        original, module.gather_features = module.gather_features, gathered
        try:
            return torch.autograd.grad(loss(*mine, scale), [*mine, *(part for part in rest if len(part)), scale])
        finally:
            module.gather_features = original

    return work


LOSSES: dict[str, Build] = {"ours": ours, "open_clip local": local, "open_clip full": full}
