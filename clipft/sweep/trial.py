"""One trial of a sweep: what was tried, how far it came, and the run that trains it."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipft.config import Config
from clipft.launch import Job, Validation
from clipft.learn.stop import STOPPED
from clipft.plan import resolve
from clipft.rundir import is_locked, read_results, settle

OUTPUT = "output.txt"
GROUP = "WANDB_RUN_GROUP"  # under which wandb shows the trials of a sweep together
WAIT_S = 0.2  # between looks at a run that another process still holds

Watch = Callable[[Validation], bool]  # told each validation of a trial; true when the trial should be stopped


@dataclass(frozen=True)
class Trial:
    number: int
    """Its folder in the sweep's."""
    params: dict[str, str]
    """The swept keys with this trial's values, as overrides write them."""
    status: str = "waiting"
    """waiting (also: stopped, to go on), finished, out of time, pruned or failed."""
    value: float | None = None
    """Of eval.select on val: the one that chose best.ckpt."""
    step: int | None = None
    """That of best.ckpt."""
    seconds: float = 0.0
    """Wall-clock time of its starts, without one that was killed together with the sweep."""
    error: str = ""

    def words(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.params.items()]

    @property
    def over(self) -> bool:
        return self.status in ("finished", "out of time", "pruned")

    @property
    def counts(self) -> bool:
        """Whether its value may be compared with those of others."""
        return self.status in ("finished", "out of time") and self.value is not None


@dataclass
class Running:
    """A trial whose ranks are at work, or whose run was at its end already."""

    trial: Trial
    path: Path
    job: Job | None
    watch: Watch
    began: float = field(default_factory=time.monotonic)
    seen: int = 0
    forwarded: int = 0
    pruned: bool = False

    def poll(self) -> Trial | None:
        """The trial as it ended, None while it runs."""
        if self.job is None:
            return self._ended(0)
        code = self.job.poll()
        self._heed_validations(self.job)
        return None if code is None else self._ended(code)

    def forward(self, asked: list[int]) -> None:
        """Sends on those of the stop signals that have come since the last time."""
        for number in asked[self.forwarded :]:
            if self.job is not None:
                self.job.ask(number)
        self.forwarded = len(asked)

    def close(self) -> None:
        if self.job is not None:
            self.job.close()

    def _heed_validations(self, job: Job) -> None:
        new = job.ranks[0].validations[self.seen :]
        self.seen += len(new)
        for validation in new:
            if self.watch(validation) and not self.pruned:
                self.pruned = True
                job.ask(signal.SIGTERM)

    def _ended(self, code: int) -> Trial:
        selected = read_results(self.path).get("meta", {}).get("selected") or {}
        status, error = self._status(code, bool(selected))
        if self.job is not None and self.job.cause:
            with (self.path / OUTPUT).open("a", encoding="utf-8") as file:
                file.write(self.job.cause + "\n")
        return replace(
            self.trial,
            status=status,
            value=selected.get("value"),
            step=selected.get("step"),
            seconds=self.trial.seconds + time.monotonic() - self.began,
            error=error,
        )

    def _status(self, code: int, has_value: bool) -> tuple[str, str]:
        """The trial's status by its job's exit code, and what went wrong."""
        said = self.job.ranks[0].said if self.job else {}
        if code in STOPPED and self.pruned:
            return "pruned", ""
        if code in STOPPED and self.job and self.job.asked:
            return "waiting", ""
        if code in STOPPED and said.get("reason") == "train.max_time":
            late = "train.max_time was over before the first validation"
            return ("out of time", "") if has_value else ("failed", late)
        if code == 0:
            return ("finished", "") if has_value else ("failed", "no validation gave a number")
        cause = self.job.cause if self.job else ""
        return "failed", (cause.splitlines() or [f"it ended with exit code {code}"])[-1].replace("error: ", "", 1)


def start(trial: Trial, config: Config, environment: dict[str, str], watch: Watch) -> Running:
    """Starts the trial's run, or goes on where it stopped; raises what is wrong with its config before that."""
    found = settle(resolve(config))
    if found.state == "finished":
        return Running(trial, found.path, None, watch)
    job = Job()
    with (found.path / OUTPUT).open("ab") as output:
        together = {GROUP: os.environ.get(GROUP, found.path.parent.name)}
        file = found.path / "config.yaml"
        job.start("train", file, config.trainer.devices, environment | together, output.fileno())
    return Running(trial, found.path, job, watch)


def failed(trial: Trial, error: str) -> Trial:
    return replace(trial, status="failed", error=error)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest value, the first of equal ones; one that was pruned does not count."""
    return max((trial for trial in trials if trial.counts), key=lambda trial: trial.value or 0.0, default=None)


def wait_until_free(path: Path, give_up: Callable[[], bool]) -> None:
    """Returns when no process holds the run's folder: the ranks of a killed sweep save their state before they go."""
    while is_locked(path) and not give_up():
        time.sleep(WAIT_S)
