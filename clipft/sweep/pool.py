"""Runs the trials of a sweep, as many side by side as there are places, until none is left or somebody stops it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipft.config import Config
from clipft.launch import POLL_S, heeding
from clipft.sweep.grid import Grid
from clipft.sweep.search import Search
from clipft.sweep.show import Show
from clipft.sweep.trial import Running, Trial, failed, start, wait_until_free

Source = Grid | Search  # where trials come from


@dataclass
class Pool:
    source: Source
    folder: Path
    compose: Callable[[Trial], Config]
    show: Show
    free: list[dict[str, str]]
    """The places that no trial has, as the variables that give each its part of the machine."""

    def __post_init__(self):
        self.running: list[tuple[Running, dict[str, str]]] = []
        self.asked: list[int] = []
        self.exhausted = False

    def run(self) -> int | None:
        """The first stop signal that came, after which the running trials saved their state; None when all are done."""
        with heeding(self.asked.append):
            try:
                while self._fill() or self.running:
                    self._poll()
                    time.sleep(POLL_S)
            finally:
                for running, _ in self.running:
                    running.close()
        return self.asked[0] if self.asked else None

    def _fill(self) -> bool:
        """Starts a trial where there is a place; true when it has, or tried."""
        if self.asked or self.exhausted or not self.free:
            return False
        if (trial := self.source.next()) is None:
            self.exhausted = True
            return False
        self.show.started(trial)
        place = self.free.pop()
        try:
            wait_until_free(self.folder / str(trial.number), give_up=lambda: bool(self.asked))
            if self.asked:
                self._end(trial)
                return False
            running = start(trial, self.compose(trial), place, lambda each: self.source.prune(trial, each))
        except (ValueError, OSError) as error:  # of this trial's config, before anything heavy
            self.free.append(place)
            self._end(failed(trial, str(error)))
            return True
        self.running.append((running, place))
        return True

    def _poll(self) -> None:
        for running, place in list(self.running):
            running.forward(self.asked)
            if (trial := running.poll()) is not None:
                running.close()
                self.running.remove((running, place))
                self.free.append(place)
                self._end(trial)
        if self.running and self.show.due():
            self.show.progress([running for running, _ in self.running], self.source.trials, self.source.planned)

    def _end(self, trial: Trial) -> None:
        self.source.tell(trial)
        self.show.ended(trial, self.source.trials)
