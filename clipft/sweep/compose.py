"""Hydra's part in a trial: its settings -> its config."""

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from clipft.arguments import explain, quoted, to_overrides
from clipft.config import Config
from clipft.plan import resolve
from clipft.sweep.trial import Trial


@dataclass(frozen=True)
class Composer:
    loader: ConfigLoader
    master: DictConfig
    """The sweep's own config, with Hydra's node."""
    fixed: list[str]
    """The arguments that all trials have in common."""

    def overrides(self, trial: Trial, folder: Path) -> list[str]:
        """What Hydra reads for the trial, with its place in the sweep's folder."""
        place = [f"runs_dir={quoted(str(folder))}", f"name='{trial.number}'", "resume=auto"]
        return [*to_overrides([*self.fixed, *trial.words()], Config), *place]

    def compose(self, trial: Trial, folder: Path) -> Config:
        """Raises ValueError for settings that cannot be."""
        try:
            config = OmegaConf.to_object(
                without_hydra(self.loader.load_sweep_config(self.master, self.overrides(trial, folder)))
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error)) from error
        assert isinstance(config, Config)
        return config

    def check(self, points: list[dict[str, str]]) -> None:
        """Raises when no trial of the points could be started; where one can, the others are the sweep's to report."""
        errors = []
        for params in points:
            trial = Trial(0, params)
            try:
                resolve(self.compose(trial, Path("runs")))
                return
            except ValueError as error:
                errors.append((" ".join(trial.words()), str(error)))
        if len({text for _, text in errors}) == 1:
            raise ValueError(errors[0][1])
        raise ValueError("no trial can be started:\n" + "\n".join(f"  {words}: {text}" for words, text in errors))


def without_hydra(config: DictConfig) -> DictConfig:
    node = config.copy()
    with flag_override(node, ["struct", "readonly"], [False, False]):
        del node["hydra"]
    return node
