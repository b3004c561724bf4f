"""Which folder a sweep lives in, and whether it is the sweep that lived there before."""

import itertools
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clipft.config import GridConfig, SearchConfig
from clipft.files import replace_file
from clipft.rundir import FREE, flat, locked
from clipft.sweep.space import Axis

SWEEP = "sweep.yaml"


def enter(base: DictConfig, name: str | None, axes: list[Axis], settings: GridConfig | SearchConfig) -> Path:
    """The sweep's folder, made or gone on in; raises where another sweep, or a run, lives under that name."""
    facts = identity(base, axes, settings)
    runs = Path(base.runs_dir)
    if base.resume == "force":
        raise ValueError(
            "resume=force goes on under a changed config, and the trials of a sweep must have one in common. Use "
            "another name=, or resume=restart to begin again."
        )
    if name is not None:
        return _open(runs / name, facts, base.resume == "restart")
    for number in itertools.count(1):
        path = runs / (default_name(base) + (f"-{number}" if number > 1 else ""))
        if not (path / SWEEP).exists() or not differences(path, facts):
            return _open(path, facts, base.resume == "restart")
    raise AssertionError("unreachable")


def default_name(base: DictConfig) -> str:
    """The experiment's name, or model and data, with -sweep: a single run has the name without."""
    if base.name is not None:
        return f"{base.name}-sweep"
    data = OmegaConf.select(base, "data.name", throw_on_missing=False) or "data"
    return f"{Path(base.model.name).name}-{data}-sweep"


def identity(base: DictConfig, axes: list[Axis], settings: GridConfig | SearchConfig) -> dict[str, Any]:
    """What all trials of a sweep share. A grid may get more values later, a search more trials."""
    swept = [axis.key for axis in axes]
    whole = flat(OmegaConf.to_container(base, resolve=True))
    facts = {key: value for key, value in whole.items() if not any(_is_under(key, each) for each in (*FREE, *swept))}
    if isinstance(settings, GridConfig):
        return facts | {"swept keys": sorted(swept)}
    how = {f"hydra.sweeper.{key}": getattr(settings, key) for key in ("sampler", "pruner", "n_startup_trials", "seed")}
    return facts | how | {axis.key: axis.text for axis in axes}


def differences(path: Path, facts: dict[str, Any]) -> list[str]:
    """A line for each fact in which the sweep that lives there differs."""
    before: Any = OmegaConf.to_container(OmegaConf.load(path / SWEEP))
    keys = dict.fromkeys([*before, *facts])
    return [f"  {key}: {before.get(key)} -> {facts.get(key)}" for key in keys if before.get(key) != facts.get(key)]


def _is_under(key: str, node: str) -> bool:
    return key == node or key.startswith(f"{node}.")


def _open(path: Path, facts: dict[str, Any], restart: bool) -> Path:
    if (path / SWEEP).exists() and restart:
        with locked(path):
            old = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.old-{n}")).exists())
            path.rename(old)
    if (path / SWEEP).exists():
        if changed := differences(path, facts):
            lines = "\n".join(changed)
            raise ValueError(
                f"{path} belongs to another sweep:\n{lines}\nUse another name=, or resume=restart to begin again."
            )
        return path
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"name={path.name!r}: {path} exists and is no sweep (it has no {SWEEP}). Use another name=.")
    path.mkdir(parents=True, exist_ok=True)
    replace_file(path / SWEEP, OmegaConf.to_yaml(OmegaConf.create(facts)))
    return path
