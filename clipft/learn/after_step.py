"""What follows each step: the ranks agree, the step is written down, validated, saved, stopped where that is due."""

import math
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from clipft.data.loader import Batch
from clipft.learn.checkpoint import forget_old, point, step_path
from clipft.learn.gather import rank, world
from clipft.learn.journal import Journal
from clipft.learn.module import ContrastiveModule, StepRecord
from clipft.learn.stop import StopRequest, Timer

Validate = Callable[[], dict[str, float]]
SEEN_BEFORE_JUDGING = 200  # one bad sample among the first few is no rate


@dataclass(frozen=True)
class Sums:
    """A step's record with the sums over ranks as they stand on the device, and this rank's times."""

    record: StepRecord
    values: Tensor
    wait_s: float
    total_s: float


@dataclass(frozen=True)
class Due:
    """What the ranks agreed to do after a step; `stop` is a signal number or 0."""

    save: bool = False
    evaluate: bool = False
    stop: int = 0


class AfterStep(pl.Callback):
    """One small reduction per step, and then what all ranks know alike is done by all of them."""

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        save: Timer,
        evaluate: Timer,
        validate: Validate,
        validate_first: bool,
        select: str,
        keep: int,
        max_bad_frac: float,
        lag: int,
    ):
        """`lag`: steps after which sums are read; 1 on a GPU, where they are there by then without waiting."""
        self.folder, self.journal, self.save, self.evaluate = folder, journal, save, evaluate
        self.validate, self.validate_first, self.select = validate, validate_first, select
        self.keep, self.max_bad_frac, self.lag = keep, max_bad_frac, lag
        self.stop = StopRequest()
        self.best_step, self.best_value = 0, -math.inf
        self.num_seen, self.num_dropped = 0, 0
        self.reasons: Counter[str] = Counter()  # of this rank
        self.waiting: deque[Sums] = deque()
        self.start = self.end = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": [self.select, self.best_step, self.best_value],
            "num_seen": self.num_seen,
            "num_dropped": self.num_dropped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        select, best_step, best_value = state_dict["best"]
        if select == self.select:  # else the old best was the best of something else
            self.best_step, self.best_value = best_step, best_value
        self.num_seen, self.num_dropped = state_dict["num_seen"], state_dict["num_dropped"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()  # here, because Lightning has installed its own by now
        if self.validate_first:
            value = select_value(self.validate(), self.select)
            self.journal.print(f"step 0/{self.journal.num_steps}  val {self.select} {value:.4f}")
        self.save.restart()
        self.evaluate.restart()
        self.end = time.perf_counter()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop.uninstall()

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
        self.waiting.append(Sums(record, self._sum(record, batch), self.start - self.end, now - self.end))
        due = self._read(leave=self.lag)
        evaluate = due.evaluate or self.evaluate.due_by_step(record.step) or last
        save = due.save or due.stop > 0 or self.save.due_by_step(record.step) or last
        if evaluate or save:  # a saved state has all its rows on disk
            self._read(leave=0)
        improved = evaluate and self._validate(pl_module, record.step)
        self.journal.write()
        if save or improved:
            self._save(trainer, record.step)
        if due.stop and not last:
            self.stop.agreed = due.stop
            trainer.should_stop = True
        self.end = time.perf_counter()

    def _sum(self, record: StepRecord, batch: Batch) -> Tensor:
        """Loss, rows with shared positives, dropped samples, and the wishes to save, evaluate and stop."""
        self.reasons.update(batch.dropped)
        first = rank() == 0  # durations run on one clock
        mine = [
            sum(batch.dropped.values()),
            first and self.save.due_by_clock(),
            first and self.evaluate.due_by_clock(),
            self.stop.received == signal.SIGTERM,
            self.stop.received == signal.SIGINT,
        ]
        gradients = record.gradients
        host = torch.tensor([float(value) for value in mine], device=gradients.loss.device)
        values = torch.cat([torch.stack([gradients.loss, gradients.shared]), host])
        if world() > 1:
            dist.all_reduce(values)
        return values

    def _read(self, leave: int) -> Due:
        """Writes down all steps but the newest `leave`; returns what is due because of them."""
        save = evaluate = False
        stop = 0
        while len(self.waiting) > leave:
            sums = self.waiting.popleft()
            loss, shared, dropped, saves, evaluates, terminates, interrupts = sums.values.tolist()
            save, evaluate = save or saves > 0, evaluate or evaluates > 0
            stop = signal.SIGTERM if terminates else signal.SIGINT if interrupts else stop
            self.journal.step(sums.record, loss, int(shared), int(dropped), sums.wait_s, sums.total_s)
            self.num_seen += self.journal.batch_size
            self.num_dropped += int(dropped)
            self._check_dropped()
        return Due(save, evaluate, stop)

    def _check_dropped(self) -> None:
        if self.num_seen >= SEEN_BEFORE_JUDGING and self.num_dropped > self.max_bad_frac * self.num_seen:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(5))
            raise ValueError(
                f"{self.num_dropped} of the first {self.num_seen} samples could not be used ({reasons} on this rank), "
                f"more than data.max_bad_frac={self.max_bad_frac}. Repair the data, or raise the limit."
            )

    def _validate(self, module: ContrastiveModule, step: int) -> bool:
        """Adds the validation to the step's row; true when it is the best so far."""
        metrics = self.validate()
        module.train_mode()
        self.evaluate.restart()
        value = select_value(metrics, self.select)
        improved = value > self.best_value
        if improved:
            self.best_step, self.best_value = step, value
        self.journal.validation(
            step, metrics, f"{self.select} {value:.4f}", f"{self.best_value:.4f} at {self.best_step}"
        )
        return improved

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        path = step_path(self.folder, step)
        trainer.save_checkpoint(path)
        if rank() == 0:
            if self.best_step == step or not (self.folder / "best.ckpt").exists():
                point(self.folder, "best", path)
            point(self.folder, "last", path)
            forget_old(self.folder, self.keep)
        self.save.restart()


def select_value(metrics: dict[str, float], select: str) -> float:
    """The number that best.ckpt maximises: one metric, or the mean of both directions for mean_recall@k."""
    names = [select.replace("mean_", side) for side in ("text_to_image_", "image_to_text_")]
    names = names if select.startswith("mean_") else [select]
    if not all(name in metrics for name in names):
        raise ValueError(
            f"eval.select={select!r} is not measured on this val split. It has: {', '.join(sorted(metrics))}."
        )
    return sum(metrics[name] for name in names) / len(names)
