"""Sweeps as Hydra knows them: python train.py -m, with hydra/sweeper=grid (the default) or optuna."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import make_dataclass
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig

from clipft.config import GridConfig, SearchConfig

PLUGIN = "hydra_plugins.clipft"  # Hydra takes plugins from this package alone


class Sweep(Sweeper):
    def __init__(self, **settings: Any):
        settings["params"] = dict(settings["params"])
        self.settings = SearchConfig(**settings) if "n_trials" in settings else GridConfig(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[[Any], Any], config: DictConfig) -> None:
        self.context, self.task, self.master = hydra_context, task_function, config
        # Launchers send Hydra's registry to processes that could not import this module; without it, by value.
        sys.modules.pop(PLUGIN, None)

    def sweep(self, arguments: list[str]) -> None:
        """Runs all trials; leaves the exit code with the task, because Hydra returns nothing."""
        from clipft.sweep.launched import SweepTask
        from clipft.sweep.run import run

        assert isinstance(self.task, SweepTask)
        self.task.code = run(self.context, self.master, self.task, self.settings)


def register_sweepers() -> None:
    """Makes hydra/sweeper=grid and hydra/sweeper=optuna known to Hydra."""
    package, _, name = PLUGIN.rpartition(".")
    if importlib.util.find_spec(package) is None:  # no other plugin is installed
        sys.modules[package] = ModuleType(package)
    module = sys.modules[PLUGIN] = ModuleType(PLUGIN)
    setattr(importlib.import_module(package), name, module)
    Sweep.__module__, module.Sweep = PLUGIN, Sweep  # pyright: ignore[reportAttributeAccessIssue]
    Plugins.instance().register(Sweep)
    for name, schema in (("grid", GridConfig), ("optuna", SearchConfig)):
        target = ("_target_", str, f"{PLUGIN}.Sweep")
        node = make_dataclass(schema.__name__, [target], bases=(schema,), kw_only=True)
        ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="clipft")
