"""Which folder a run lives in, and whether it begins, goes on or is finished. Nothing heavy is imported here."""

import fcntl
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from clipft.config import Config
from clipft.files import replace_file
from clipft.model.forms import SUFFIXES

Schema = TypeVar("Schema")

# Settings that the result does not depend on: a run may go on under other ones.
FREE = (
    "name",
    "runs_dir",
    "resume",
    "logger",
    "model.grad_checkpointing",
    "train.micro_batch",
    "train.cache_features",
    "train.compile",
    "train.max_time",
    "train.max_skipped",
    "data.max_bad_frac",
    "data.workers",
    "data.cache_dir",
    "data.cache_size",
    "data.allow_pipe",
    "checkpoint",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.dist_timeout_s",
)


@dataclass(frozen=True)
class RunDir:
    path: Path
    state: str
    """new, resumed or finished."""


def settle(config: Config) -> RunDir:
    """Chooses and prepares the run's folder; an old run's files are kept, moved or refused as config.resume says."""
    if config.name is not None:
        return _enter(Path(config.runs_dir) / config.name, config)
    for number in itertools.count(1):
        path = Path(config.runs_dir) / (default_name(config) + (f"-{number}" if number > 1 else ""))
        if not (path / "config.yaml").exists():
            return _enter(path, config)
        same = not differences(load_config(path / "config.yaml", Config), config)
        if same and (config.resume == "restart" or not is_finished(path)):
            return _enter(path, config)
    raise AssertionError("unreachable")


def default_name(config: Config) -> str:
    model = Path(config.model.name)
    return f"{model.stem if model.suffix in SUFFIXES else model.name}-{config.data.name or 'data'}"


def _enter(path: Path, config: Config) -> RunDir:
    file = path / "config.yaml"
    if not file.exists():
        if path.exists() and any(path.iterdir()):
            raise ValueError(
                f"name={path.name!r}: {path} exists and is no run (it has no config.yaml). Use another name."
            )
        return _begin(path, config)
    with locked(path):  # a job that is running there must find its files as it left them
        return _reenter(path, config)


def _reenter(path: Path, config: Config) -> RunDir:
    """Goes on in the folder of a run, or begins again beside it."""
    file = path / "config.yaml"
    if config.resume == "restart":
        old = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.old-{n}")).exists())
        path.rename(old)
        return _begin(path, config)
    changed = differences(load_config(file, Config), config)
    if changed and config.resume != "force":
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in changed)
        raise ValueError(
            f"{path} belongs to another config:\n{lines}\n"
            "Use another name=, resume=force to go on under the new config, or resume=restart to begin again."
        )
    if not changed and is_finished(path):
        return RunDir(path, "finished")
    if changed:
        forget_results(path, [key for key, _, _ in changed])
    has_state = (path / "checkpoints" / "last.ckpt").exists()
    save_config(file, replace(config, name=path.name))
    return RunDir(path, "resumed" if has_state else "new")


def _begin(path: Path, config: Config) -> RunDir:
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_config(path / "config.yaml", replace(config, name=path.name))
    return RunDir(path, "new")


def forget_results(path: Path, changed: list[str]) -> None:
    """Drops what the changed keys make untrue: the end, and the base where it would be measured otherwise."""
    results = read_results(path)
    other_base = any(key.startswith(("model.", "data.", "eval.")) for key in changed)
    for column in ["best", "last", "meta", *(["base"] if other_base else [])]:
        results.pop(column, None)
    if results or (path / "results.json").exists():
        write_results(path, results)


def is_finished(path: Path) -> bool:
    return bool(read_results(path).get("meta", {}).get("finished"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the run's folder: two jobs in one would overwrite each other."""
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{path} is being trained by another process. Wait for its end, or use another name=."
            ) from error
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the run's folder."""
    if not (path / ".lock").exists():
        return False
    try:
        with locked(path):
            return False
    except ValueError:
        return True


def read_results(path: Path) -> dict[str, Any]:
    """The run's results.json; empty where there is none yet."""
    file = path / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write_results(path: Path, results: dict[str, Any]) -> None:
    replace_file(path / "results.json", json.dumps(results, indent=2) + "\n")


def log(folder: Path, text: str) -> None:
    """Adds the text to the run's log.txt, with the time, where the disk takes it: all of it is shown elsewhere too."""
    with suppress(OSError), (folder / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Keys that matter for the result and have other values, with both."""
    before, after = what_matters(old), what_matters(new)
    return [(key, before.get(key), after[key]) for key in after if before.get(key) != after[key]]


def what_matters(config: Config) -> dict[str, Any]:
    """The settings that the result depends on, by dotted key."""
    whole = flat(OmegaConf.to_container(OmegaConf.structured(config)))
    return {key: whole[key] for key in whole if not any(key == free or key.startswith(f"{free}.") for free in FREE)}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {key: value for name, child in node.items() for key, value in flat(child, f"{prefix}{name}.").items()}


def save_config(path: Path, config: Any) -> None:
    replace_file(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_config(path: Path, schema: type[Schema]) -> Schema:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))
    assert isinstance(config, schema)
    return config
