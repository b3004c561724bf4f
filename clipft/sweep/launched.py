"""Trials through a launcher of Hydra's (joblib, submitit, ...): it calls the task where it likes."""

import signal
import time
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from clipft.config import Config, SearchConfig
from clipft.files import replace_file
from clipft.launch import heeding
from clipft.sweep.compose import Composer
from clipft.sweep.pool import Source
from clipft.sweep.search import watch_from_elsewhere
from clipft.sweep.show import Show
from clipft.sweep.trial import Trial, Watch, failed, start, wait_until_free

STOP = "stop"  # a file in the sweep's folder: trials may run where no signal reaches them
POLL_S = 0.2


class SweepTask:
    """What Hydra calls for a trial, in this process or another one."""

    def __init__(self, program: str, arguments: list[str]):
        self.program, self.arguments = program, arguments
        self.code = 0

    def __call__(self, node: DictConfig) -> Trial:
        """Trains the trial to its end, or until it is stopped; what goes wrong with it is in what comes back."""
        config = OmegaConf.to_object(node)
        assert isinstance(config, Config) and config.name is not None
        folder, trial = Path(config.runs_dir), Trial(int(config.name), {})
        stop = folder / STOP
        wait_until_free(folder / config.name, give_up=stop.exists)
        if stop.exists():
            return trial
        try:
            running = start(trial, config, {}, watch_of(folder, trial.number))
        except (ValueError, OSError) as error:
            return failed(trial, str(error))
        asked: list[int] = []
        with heeding(asked.append):
            try:
                while (ended := running.poll()) is None:
                    if not asked and stop.exists():
                        asked.append(int(stop.read_text()))
                    running.forward(asked[:1])  # Ctrl-C comes both ways, and two of them would kill the ranks
                    time.sleep(POLL_S)
            finally:
                running.close()
        return ended


def watch_of(folder: Path, number: int) -> Watch:
    """The pruner's eye on a trial of a search; of a grid nobody's."""
    sweeper = HydraConfig.get().sweeper
    if "n_trials" not in sweeper:
        return lambda validation: False
    settings = {key: sweeper[key] for key in ("sampler", "pruner", "n_startup_trials", "seed")}
    return watch_from_elsewhere(folder, number, SearchConfig(**settings))


def run_launched(
    source: Source, folder: Path, composer: Composer, launcher: Launcher, batch: int, show: Show
) -> int | None:
    """Launches the trials, `batch` at a time; the stop signal that came meanwhile, if one has."""
    asked: list[int] = []
    stop = folder / STOP
    stop.unlink(missing_ok=True)

    def ask(number: int) -> None:
        if number == signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)
        replace_file(stop, str(number))

    with heeding(ask):
        try:
            while not asked and (trials := next_batch(source, folder, composer, batch, show)):
                launch_batch(source, folder, composer, launcher, trials, show)
        except (KeyboardInterrupt, Exception):
            if not asked:  # else the launcher lost its processes to the same Ctrl-C
                raise
    if asked:
        return asked[0]
    return signal.SIGTERM if any(trial.status == "waiting" for trial in source.trials) else None


def next_batch(source: Source, folder: Path, composer: Composer, batch: int, show: Show) -> list[Trial]:
    """Up to so many trials whose configs are good; the others are told as failed."""
    trials: list[Trial] = []
    while len(trials) < batch and (trial := source.next()) is not None:
        show.started(trial)
        try:
            composer.compose(trial, folder)
            trials.append(trial)
        except ValueError as error:
            source.tell(ended := failed(trial, str(error)))
            show.ended(ended, source.trials)
    return trials


def launch_batch(
    source: Source, folder: Path, composer: Composer, launcher: Launcher, trials: list[Trial], show: Show
) -> None:
    overrides = [composer.overrides(trial, folder) for trial in trials]
    returns = launcher.launch(overrides, initial_job_idx=trials[0].number)
    for trial, returned in zip(trials, returns, strict=True):
        if returned.status == JobStatus.COMPLETED:
            came: Trial = returned.return_value
            ended = replace(came, params=trial.params, seconds=trial.seconds + came.seconds)
        else:
            ended = failed(trial, str(returned._return_value))
        source.tell(ended)
        show.ended(ended, source.trials)
