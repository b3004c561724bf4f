"""The trials of a grid: every combination of the values once."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from clipft.files import replace_file
from clipft.launch import Validation
from clipft.sweep.trial import Trial

TRIALS = "trials.json"


class Grid:
    def __init__(self, folder: Path, points: list[dict[str, str]]):
        """Trials of an earlier start keep their numbers; those that failed or were stopped come again."""
        self.file = folder / TRIALS
        rows = json.loads(self.file.read_text()) if self.file.exists() else []
        before = [Trial(**row) for row in rows]
        kept = [trial for trial in before if trial.over or trial.params in points]
        self.by_number = {trial.number: trial for trial in kept}
        self.to_do: list[int] = []
        number = max(self.by_number, default=-1)
        for point in points:
            known = next((trial for trial in kept if trial.params == point), None)
            if known is None:
                number += 1
                known = self.by_number[number] = Trial(number, point)
            if not known.over:
                self.to_do.append(known.number)
        self._write()

    @property
    def trials(self) -> list[Trial]:
        return sorted(self.by_number.values(), key=lambda trial: trial.number)

    @property
    def planned(self) -> int:
        return len(self.by_number)

    def next(self) -> Trial | None:
        """A trial to start; None where there is none left."""
        return replace(self.by_number[self.to_do.pop(0)], status="waiting", error="") if self.to_do else None

    def tell(self, trial: Trial) -> None:
        """Takes down how a trial ended."""
        self.by_number[trial.number] = trial
        self._write()

    def prune(self, trial: Trial, validation: Validation) -> bool:
        """False: whoever asks for a grid wants all of it."""
        return False

    def _write(self) -> None:
        replace_file(self.file, json.dumps([asdict(trial) for trial in self.trials], indent=1) + "\n")
