"""bench step: forward, backward and optimizer on a batch on the device, beside loops over open_clip's modules."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from clipft.bench.report import Row, ratios
from clipft.bench.shards import draw_captions
from clipft.config import Every, LossConfig, ModelConfig, OptimConfig
from clipft.data.loader import Batch
from clipft.data.waiting import as_it_is
from clipft.fit import build_trainer, host_lag, towers_of
from clipft.learn.after_step import AfterStep, Intervals
from clipft.learn.journal import Journal
from clipft.learn.ledger import Ledger
from clipft.learn.losses import build_loss, chance_loss
from clipft.learn.memory import peak_bytes
from clipft.learn.metrics_file import MetricsFile
from clipft.learn.module import ContrastiveModule, Plan, freeze_fixed
from clipft.learn.saver import Saver
from clipft.learn.skips import Skips
from clipft.learn.stop import StopRequest
from clipft.model.blocks import AS_THEY_ARE, Blocks
from clipft.model.compiled import TEXT_BUCKET, compiled_blocks
from clipft.model.encode import can_trim, encode_image, encode_text, to_float, trim_tokens
from clipft.model.load import Clip, load_model
from clipft.ranks import Ranks

LR, NEVER = 1e-5, 1 << 40
UNTIMED = 2  # steps of a run: the first one warms up, the last one is written down
# Dense bf16 of data sheets, in TFLOP/s, the first that fits the device's name; other devices have no MFU here.
PEAKS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
Run = Callable[["Resident", int], list[float]]
"""So many steps on what lies on the device -> seconds of each."""


@dataclass(frozen=True)
class Resident:
    """A model and a batch on one device."""

    clip: Clip
    batch: Batch
    full_tokens: Tensor
    """Of the same captions, at the context length."""
    ranks: Ranks

    @property
    def size(self) -> int:
        return len(self.batch)

    @property
    def pixels(self) -> Tensor:
        return to_float(self.batch.pixels, self.clip.preprocess_cfg["mean"], self.clip.preprocess_cfg["std"])


def place(architecture: str, batch_size: int, device: torch.device, precision: str) -> Resident:
    """Random weights, random pixels, captions as people write them; the same ones each time."""
    clip = load_model(ModelConfig(name=architecture, pretrained=None), seed=0)
    freeze_fixed(clip.model, LossConfig())
    clip.model.to(device).train()
    full = clip.tokenize(draw_captions(batch_size)).long()
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, 3, clip.side, clip.side), generator=drawn, dtype=torch.uint8)
    rows = torch.arange(batch_size)
    tokens = trim_tokens(clip.model, full) if can_trim(clip.model, clip.tokenize) else full
    batch = Batch(pixels, tokens, rows >= 0, rows, [str(row) for row in range(batch_size)], {})
    return Resident(clip, batch.to(device), full.to(device), Ranks(device, 0, 1, 1, precision))


def bench_step(resident: Resident, steps: int, rounds: int, compiled: bool = False) -> list[Row]:
    """Ours, and a loop as one would write it: open_clip's modules and loss, all tokens, AdamW as it comes."""
    work: dict[str, Run] = {"ours": ours, "plain loop": plain, "plain loop, our encoders": plain_with_our_encoders}
    counted = dict(work)
    if compiled:  # the FLOPs are counted on the same steps without graphs, as the counter sees no operations in them
        work["ours, compiled"] = partial(in_buckets, compiled_blocks())
        counted["ours, compiled"] = partial(in_buckets, AS_THEY_ARE)
    times: dict[str, list[list[float]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            times[name].append(run(resident, steps))
    per_step = {name: [median(each) for each in of] for name, of in times.items()}
    rows: list[Row] = []
    for name, seconds in per_step.items():
        row: Row = {"what": name, "ms a step": 1000 * median(seconds), "samples/s": resident.size / median(seconds)}
        row |= {"speed-up over plain": ratios(per_step["plain loop"], seconds)}
        row |= flops(resident, counted[name], median(seconds))
        rows.append(row | {"peak MB": peak_of_step(resident, work[name]) / 1e6})
    return rows


def flops(resident: Resident, run: Run, seconds: float) -> Row:
    """Counted FLOPs of one step, as it executes them, and its share of the device's bf16 peak."""
    with FlopCounterMode(display=False) as counter:
        run(resident, 1)
    tera = counter.get_total_flops() / (1 + UNTIMED) / 1e12
    name = torch.cuda.get_device_name() if resident.ranks.device.type == "cuda" else ""
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    row: Row = {"TFLOP a step": tera, "TFLOP/s": tera / seconds}
    if peak is not None and resident.ranks.precision == "bf16-mixed":
        row["MFU"] = tera / seconds / peak
    return row


def peak_of_step(resident: Resident, run: Run) -> int:
    """Bytes that steps need beyond weights and batch; what earlier runs have left is cleared away before."""
    resident.clip.model.zero_grad()
    gc.collect()
    return peak_bytes(lambda: run(resident, 1), resident.ranks.device)


def ours(resident: Resident, steps: int) -> list[float]:
    """Seconds of the steps under Lightning's Trainer, with all that follows a step of a run."""
    return in_blocks(AS_THEY_ARE, resident, steps)


def in_buckets(blocks: Blocks, resident: Resident, steps: int) -> list[float]:
    """Ours with captions as long as compiled blocks want them."""
    tokens = resident.full_tokens
    if resident.batch.tokens.shape[1] < tokens.shape[1]:
        tokens = trim_tokens(resident.clip.model, tokens, TEXT_BUCKET)
    return in_blocks(blocks, replace(resident, batch=replace(resident.batch, tokens=tokens)), steps)


def in_blocks(blocks: Blocks, resident: Resident, steps: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="clipft-bench-") as folder, step_clock(resident.ranks.device) as clock:
        train(resident, Path(folder), steps + UNTIMED, blocks=blocks)
    return clock()[:-1]


def train(
    resident: Resident,
    folder: Path,
    num_steps: int,
    *,
    lr: float = LR,
    batches: Iterable[Batch] | None = None,
    micro_batch: int | None = None,
    gather_dtype: torch.dtype | None = None,
    blocks: Blocks = AS_THEY_ARE,
    watching: Sequence[pl.Callback] = (),
) -> None:
    """Steps of this rank as a run has them, but that no state is written; each rank has a batch of the same size."""
    plan = Plan(
        num_steps=num_steps,
        warmup_steps=0,
        batch_size=resident.size * resident.ranks.world,
        micro_batch=micro_batch or resident.size,
        lr=lr,
        multipliers={name: 1.0 for name, _ in resident.clip.model.named_parameters()},
        ema=None,
        seed=0,
        train_batch_norm=False,
        clamp_scale=True,
        with_ids=True,
        gather_dtype=gather_dtype,
    )
    loss, towers = build_loss("clip", "share", 0.0), towers_of(resident.clip, blocks)
    module = ContrastiveModule(resident.clip.model, towers, loss, OptimConfig(lr=lr), plan)
    after = after_step(folder, resident, plan)
    data: Any = [resident.batch] * num_steps if batches is None else batches
    loader = DataLoader(data, batch_size=None, collate_fn=as_it_is)
    trainer: Any = build_trainer(resident.ranks, None, after, after.saver)
    trainer.callbacks += watching
    trainer.save_checkpoint = lambda *_: None
    trainer.fit(module, loader)


def after_step(folder: Path, resident: Resident, plan: Plan) -> AfterStep:
    """As a run has it, but that nothing is due before the last step."""

    def say(_: str) -> None:
        pass

    chance = chance_loss("clip", plan.batch_size)
    file = MetricsFile(folder / "metrics.csv", 0) if resident.ranks.first else None
    journal = Journal(file, [], say, batch_size=plan.batch_size, chance=chance, num_steps=plan.num_steps, first_step=0)
    journal.draws = False
    return AfterStep(
        folder / "checkpoints",
        journal,
        saver=Saver(1, {}, say),
        stop=StopRequest(),
        ledger=Ledger(1.0, NEVER, "resident"),
        skips=Skips(1, say),
        every=Intervals(save=Every(steps=NEVER), evaluate=Every(steps=NEVER)),
        validate=lambda: {"text_to_image_recall@1": 0.0, "image_to_text_recall@1": 0.0},
        validate_first=False,
        select="mean_recall@1",
        patience=None,
        best_is_lost=False,
        lag=host_lag(resident.ranks),
    )


def plain(resident: Resident, steps: int) -> list[float]:
    return loop(resident, plain_step(resident, LR), steps)


def plain_with_our_encoders(resident: Resident, steps: int) -> list[float]:
    return loop(resident, plain_step_with_our_encoders(resident, LR), steps)


def plain_step(resident: Resident, lr: float) -> Callable[[], None]:
    """A step as one would write it on open_clip's modules."""
    model = resident.clip.model

    def features() -> tuple[Tensor, Tensor]:
        image = model.encode_image(resident.pixels, normalize=True)
        return image, model.encode_text(resident.full_tokens, normalize=True)

    optimizer = torch.optim.AdamW(decayed(model), lr=lr, betas=(0.9, 0.98), eps=1e-6)
    return bare_step(resident, features, optimizer)


def plain_step_with_our_encoders(resident: Resident, lr: float) -> Callable[[], None]:
    """The maths of ours: cut captions, narrow last blocks, fused AdamW."""
    model = resident.clip.model

    def features() -> tuple[Tensor, Tensor]:
        return encode_image(model, resident.pixels), encode_text(model, resident.batch.tokens, trim=False)

    optimizer = torch.optim.AdamW(decayed(model), lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    return bare_step(resident, features, optimizer)


def decayed(model: torch.nn.Module) -> list[dict]:
    """open_clip's two groups: weight decay on what has two axes or more."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trained if each.ndim >= 2], "weight_decay": 0.1},
        {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
    ]


def bare_step(
    resident: Resident, features: Callable[[], tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    from open_clip import ClipLoss

    model, loss = resident.clip.model, ClipLoss()

    def step() -> None:
        optimizer.zero_grad()
        with resident.ranks.autocast():
            image, text = features()
        loss(image.float(), text.float(), model.logit_scale.exp()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)

    return step


def loop(resident: Resident, step: Callable[[], None], steps: int) -> list[float]:
    with step_clock(resident.ranks.device) as clock:
        for _ in range(steps + UNTIMED):
            step()
    return clock()[:-1]


@contextmanager
def step_clock(device: torch.device) -> Iterator[Callable[[], list[float]]]:
    """A function that gives, after the block, the seconds between the ends of the optimizer steps inside it."""
    marks: list = []

    def mark(*_: object) -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    def seconds() -> list[float]:
        if device.type != "cuda":
            return [after - before for before, after in pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]

    handle = register_optimizer_step_post_hook(mark)
    try:
        yield seconds
    finally:
        handle.remove()
