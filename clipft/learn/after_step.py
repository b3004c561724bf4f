"""What follows each step: the ranks agree, the step is written down, validated, saved, stopped where that is due."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from clipft.config import Every
from clipft.data.loader import Batch
from clipft.data.order import num_rows
from clipft.learn.checkpoint import step_path
from clipft.learn.gather import all_objects, rank, world
from clipft.learn.journal import Journal
from clipft.learn.ledger import Ledger, bad_counts
from clipft.learn.module import ContrastiveModule, StepRecord
from clipft.learn.saver import Saver
from clipft.learn.skips import Skips
from clipft.learn.stop import STOPS, StopRequest, Timer
from clipft.report import on_the_way, tell

Validate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Intervals:
    """How often what is done."""

    save: Every
    evaluate: Every


@dataclass(frozen=True)
class Sums:
    """A step's record with the sums over ranks, on their way to the host, and this rank's times."""

    record: StepRecord
    values: Tensor
    """In host memory, there when `arrived` says so."""
    arrived: torch.cuda.Event | None
    keys: list[str]
    bad: list[tuple[str, str]]
    """Key and reason of the rows that could not be used."""
    wait_s: float
    total_s: float


@dataclass(frozen=True)
class Due:
    """What the ranks agreed to do after a step; `stop` is the reason, empty for none."""

    save: bool = False
    evaluate: bool = False
    stop: str = ""


class AfterStep(pl.Callback):
    """One small reduction per step, and then what all ranks know alike is done by all of them."""

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        saver: Saver,
        stop: StopRequest,
        ledger: Ledger,
        skips: Skips,
        every: Intervals,
        validate: Validate,
        validate_first: bool,
        select: str,
        patience: int | None,
        best_is_lost: bool,
        lag: int,
    ):
        """`lag`: steps after which sums are read; 1 on a GPU, where they are there by then without waiting."""
        self.folder, self.journal, self.saver, self.stop = folder, journal, saver, stop
        self.ledger, self.skips = ledger, skips
        self.save, self.evaluate = Timer(every.save), Timer(every.evaluate)
        self.validate, self.validate_first, self.select, self.lag = validate, validate_first, select, lag
        self.patience, self.best_is_lost = patience, best_is_lost
        self.best_step, self.best_value = 0, -math.inf
        self.since_best = 0  # validations
        self.gave_up = False  # because of patience
        self.waiting: deque[Sums] = deque()
        self.start = self.end = 0.0
        self.rows = [num_rows(journal.batch_size, each, world()) for each in range(world())]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.setdefault("clipft", {})
        state |= {"best_step": self.best_step, "best_value": self.best_value, "select": self.select}
        state["since_best"] = self.since_best
        state["ledger"] = self.ledger.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["clipft"]
        if state["select"] == self.select and not self.best_is_lost:  # else it was the best of something else
            self.best_step, self.best_value = state["best_step"], state["best_value"]
            self.since_best = state["since_best"]
        self.ledger.load_state_dict(state["ledger"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()  # once more, because Lightning has installed its own by now
        if self.validate_first:
            value = select_value(self.validate(), self.select)
            self.journal.print(f"step 0/{self.journal.num_steps}  val {self.select} {value:.4f}")
        self.save.restart()
        self.evaluate.restart()
        self.stop.stepping = True
        self.end = time.perf_counter()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop.stepping = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ContrastiveModule) and pl_module.record is not None
        record, now = pl_module.record, time.perf_counter()
        last = record.step == pl_module.plan.num_steps
        bad = [(batch.keys[row], reason) for row, reason in batch.bad.items()]
        values = to_host(self._sum(record, batch))
        sums = Sums(record, *values, batch.keys, bad, self.start - self.end, now - self.end)
        self.waiting.append(sums)
        due = self._read(leave=self.lag)
        evaluate = due.evaluate or self.evaluate.due_by_step(record.step) or last
        save = due.save or bool(due.stop) or self.save.due_by_step(record.step) or last
        reason = due.stop
        if evaluate or save:  # a saved state has all its rows on disk
            reason = self._read(leave=0).stop or reason
        improved = evaluate and self._validate(pl_module, record.step)
        self.gave_up = evaluate and self._lost_patience(record.step, last)
        self.journal.write(self.ledger.line())
        if save or improved or self.gave_up:
            self.ledger.meet()
            trainer.save_checkpoint(step_path(self.folder, record.step))
            self.save.restart()
        if self.gave_up or (reason and (save or improved)):
            self.stop.agreed = reason or self.stop.agreed
            trainer.should_stop = True
        tell(step=record.step)
        self.end = time.perf_counter()

    def leave(self, trainer: pl.Trainer, module: ContrastiveModule) -> None:
        """Saves the last step and stops before the next one, whose batch is waited for. For a single rank."""
        reason = self.stop.agreed = self.stop.wish()
        if module.step == self.journal.first_step:  # nothing is new
            raise SystemExit(STOPS[reason])
        self._read(leave=0)
        self.journal.write(self.ledger.line())
        self.ledger.meet()
        trainer.save_checkpoint(step_path(self.folder, module.step))
        trainer.should_stop = True

    def _sum(self, record: StepRecord, batch: Batch) -> Tensor:
        """Scale and norm, then sums over ranks: loss, shared positives, skips, used samples, wishes, bad samples."""
        first = rank() == 0  # durations run on one clock
        wish = self.stop.wish()
        mine = [
            first and self.save.due_by_clock(),
            first and self.evaluate.due_by_clock(),
            *(wish == reason for reason in STOPS),
            *bad_counts(batch),
        ]
        host = torch.tensor([float(value) for value in mine])
        if record.loss.device.type == "cuda":  # from page-locked memory nobody waits for the copy
            host = host.pin_memory().to(record.loss.device, non_blocking=True)
        device = [record.loss, record.shared, record.skipped, batch.valid.sum()]
        values = torch.cat([torch.stack([value.float() for value in device]), host])
        if world() > 1:
            dist.all_reduce(values)
        return torch.cat([torch.stack([record.scale.float().squeeze(), record.norm.float()]), values])

    def _read(self, leave: int) -> Due:
        """Writes down all steps but the newest `leave`; returns what is due because of them."""
        save = evaluate = False
        stop = ""
        while len(self.waiting) > leave:
            sums = self.waiting.popleft()
            if sums.arrived is not None:
                sums.arrived.synchronize()
            scale, norm, loss, shared, skipped, used, saves, evaluates, *rest = sums.values.tolist()
            save, evaluate = save or saves > 0, evaluate or evaluates > 0
            stop = next((reason for reason, wishes in zip(STOPS, rest, strict=False) if wishes > 0), stop)
            seen = [int(value) for value in rest[len(STOPS) :]]
            counts = {"shared_positives": int(shared), "dropped": seen[0], "skipped": int(skipped > 0)}
            shown = {"loss": loss, "scale": scale, "lr": sums.record.lr, "grad_norm": norm}
            self.journal.step(sums.record.step, shown, counts, sums.wait_s, sums.total_s)
            self.ledger.add(self.rows, int(used), seen, sums.bad)
            self.skips.add(sums.record, sums.keys, skipped > 0)
        return Due(save, evaluate, stop)

    def _validate(self, module: ContrastiveModule, step: int) -> bool:
        """Adds the validation to the step's row; true when it is the best so far."""
        self.saver.wait()  # loader processes are forked, and a lock that the writing thread holds would stay locked
        with module.averaged(), on_the_way():
            mine = self.validate()
        metrics = all_objects(mine)[0]  # ranks on unlike hardware could differ in the last digit
        module.train_mode()
        self.evaluate.restart()
        value = select_value(metrics, self.select)
        tell(validation={"step": step, "of": self.journal.num_steps, "value": value})
        improved = value > self.best_value
        self.since_best = 0 if improved else self.since_best + 1
        if improved:
            self.best_step, self.best_value = step, value
        # The last value of "best" is what a tracker's own sweep is to compare.
        metrics = metrics | {self.select: value, "best": self.best_value}
        self.journal.validation(
            step, metrics, f"{self.select} {value:.4f}", f"{self.best_value:.4f} at {self.best_step}"
        )
        return improved

    def _lost_patience(self, step: int, last: bool) -> bool:
        """Whether the run ends here for want of a better validation; all ranks have the same metrics."""
        lost = self.patience is not None and self.since_best >= self.patience and not last
        if lost:
            self.journal.print(
                f"Ended at step {step} of {self.journal.num_steps}: val {self.select} has not improved in "
                f"{self.since_best} validations (train.patience={self.patience})."
            )
        return lost


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The values on their way to host memory, and what says that they are there: later steps need not be waited for."""
    if values.device.type != "cuda":
        return values, None
    host, arrived = torch.empty_like(values, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(values, non_blocking=True)
    arrived.record()
    return host, arrived


def select_value(metrics: dict[str, float], select: str) -> float:
    """The number that best.ckpt maximises: one metric, or the mean of both directions for mean_recall@k."""
    names = [select.replace("mean_", side) for side in ("text_to_image_", "image_to_text_")]
    names = names if select.startswith("mean_") else [select]
    if not all(name in metrics for name in names):
        raise ValueError(
            f"eval.select={select!r} is not measured on this val split. It has: {', '.join(sorted(metrics))}."
        )
    return sum(metrics[name] for name in names) / len(names)
