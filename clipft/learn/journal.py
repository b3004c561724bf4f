"""Where a run's numbers go: metrics.csv, the terminal, loggers. Only rank 0 has one that writes."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pytorch_lightning.loggers import Logger

from clipft.learn.loggers import each_guarded
from clipft.learn.metrics_file import MetricsFile
from clipft.report import clock

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.2
LOG_EVERY_S = 1.0  # loggers may be on the far side of a network


class Journal:
    def __init__(
        self,
        file: MetricsFile | None,
        loggers: Sequence[Logger],
        log: Callable[[str], None],
        *,
        batch_size: int,
        chance: float,
        num_steps: int,
        first_step: int,
    ):
        """`file` None makes a silent journal, for ranks other than 0; `log` adds a line to the run's log."""
        self.file, self.loggers, self.log = file, loggers, log
        self.chance = chance  # the loss of a model that knows nothing
        self.batch_size, self.num_steps, self.first_step = batch_size, num_steps, first_step
        self.rows: dict[int, dict[str, float]] = {}
        self.began = self.shown = self.logged = time.monotonic()
        self.wait_s = self.total_s = 0.0
        self.since = first_step
        self.refused = False
        self.draws = sys.stderr.isatty()

    def step(self, step: int, shown: dict[str, float], counts: dict[str, int], wait_s: float, total_s: float) -> None:
        """Takes down a step; `counts` are sums over ranks, such as the dropped samples."""
        self.wait_s, self.total_s = self.wait_s + wait_s, self.total_s + total_s
        if self.file is None:
            return
        self.rows[step] = {f"train/{name}": value for name, value in (shown | counts).items()} | {
            "train/samples_per_s": self.batch_size / total_s,
            "train/data_wait_frac": wait_s / total_s,
        }

    def validation(self, step: int, metrics: dict[str, float], selected: str, best: str) -> None:
        if self.file is None:
            return
        self.rows[step] |= {f"val/{name}": value for name, value in metrics.items()}
        self.print(f"step {step}/{self.num_steps}  val {selected} (best {best})")

    def write(self, ledger: str) -> None:
        """Puts the waiting rows on disk and, where it is time, a line with the ledger on the terminal."""
        if self.file is None:
            return
        now = time.monotonic()
        for step, row in list(self.rows.items()):
            if not self._append(step, row):
                return
            if (
                now - self.logged >= LOG_EVERY_S
                or step == self.num_steps
                or any(name.startswith("val/") for name in row)
            ):
                self._log(step, row)
                self.logged = now
            if now - self.shown >= (DRAW_EVERY_S if self.draws else LINE_EVERY_S) or step == self.num_steps:
                self._show(step, row, ledger, now)

    def _append(self, step: int, row: dict[str, float]) -> bool:
        """Puts a row on disk; where the disk refuses, it waits in memory and training goes on."""
        assert self.file is not None
        try:
            self.file.append(step, row)
        except OSError as error:
            if not self.refused:
                self.print(f"warning: {self.file.path} cannot be written ({error}); rows wait in memory")
            self.refused = True
            return False
        self.refused = False
        del self.rows[step]
        return True

    def print(self, text: str) -> None:
        if self.file is not None:
            self.log(text)
            self._put(("\r\x1b[K" if self.draws else "") + text + "\n")

    def _put(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed must not cost the state that is saved next
            sys.stderr.write(text)
            sys.stderr.flush()

    def _log(self, step: int, row: dict[str, float]) -> None:
        self.loggers = each_guarded(self.loggers, lambda logger: logger.log_metrics(row, step))

    def _show(self, step: int, row: dict[str, float], ledger: str, now: float) -> None:
        speed = (step - self.since) * self.batch_size / self.total_s if self.total_s else 0.0
        left_s = (self.num_steps - step) * (now - self.began) / max(1, step - self.first_step)
        line = (
            f"step {step}/{self.num_steps}  loss {row['train/loss']:.3f} (chance {self.chance:.3f})  "
            f"eta {clock(left_s)}  {ledger}  {speed:.0f} samples/s  "
            f"data wait {100 * self.wait_s / max(self.total_s, 1e-9):.0f}%  "
            f"scale {row['train/scale']:.1f}  lr {row['train/lr']:.2e}"
        )
        if not self.draws or step == self.num_steps:
            self.log(line)
        if self.draws:
            whole = step == self.num_steps  # while it is drawn over, it must stay on one row of the terminal
            width = shutil.get_terminal_size().columns - 1
            self._put(f"\r\x1b[K{line}\n" if whole else f"\r\x1b[K{line[:width]}")
        else:
            self._put(f"{line}\n")
        self.shown, self.since, self.wait_s, self.total_s = now, step, 0.0, 0.0
