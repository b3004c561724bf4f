"""Trackers beside metrics.csv. They never end or stall a run, and nothing leaves the machine unasked."""

import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from clipft.config import Config

WAIT_S = 10.0  # for a server that does not answer
FINISH_S = 120.0  # for the rest of an upload at the end
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


@dataclass(frozen=True)
class Retrieved:
    """A caption with the images that a model finds for it."""

    caption: str
    own: UInt8[np.ndarray, "_ _ 3"]
    """The image that the caption belongs to."""
    found: list[np.ndarray]
    """The images that score highest, the first one first."""
    rank: int
    """How many images score above the own one, plus one."""


def each_guarded(loggers: Sequence[Logger], action: Callable[[Logger], None]) -> list[Logger]:
    """Does it with every logger; one that fails is named once and left out of the list that comes back."""
    working = []
    for logger in loggers:
        try:
            action(logger)
            working.append(logger)
        except Exception as error:  # whatever a tracker raises is no reason to end a run
            print(f"warning: {type(logger).__name__} is left out from here on ({error!r}).", file=sys.stderr)
    return working


def build_loggers(config: Config, folder: Path) -> list[Logger]:
    """The loggers that the config asks for, with the config written to them."""
    if config.logger == "tensorboard":
        return [build_tensorboard(config, folder)]
    return [build_wandb(config, folder)] if config.logger == "wandb" else []


def build_tensorboard(config: Config, folder: Path) -> Logger:
    try:
        logger = TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs a package. Run: pip install tensorboard") from error
    logger.experiment.add_text("config", f"```\n{OmegaConf.to_yaml(readable(config))}\n```")
    return logger


def build_wandb(config: Config, folder: Path) -> Logger:
    """A wandb run in the run's folder; offline where there is no key or the server does not answer."""
    import wandb

    asked = os.environ.get("WANDB_MODE")
    mode = asked if asked in ("offline", "disabled") else "online" if has_key() else "offline"
    try:
        return open_wandb(config, folder, mode)
    except (wandb.Error, OSError, TimeoutError) as error:
        print(f"warning: wandb is not reached ({error}); this run is logged offline.", file=sys.stderr)
        (folder / "wandb_id").unlink(missing_ok=True)  # wandb's service still holds that id
        return open_wandb(config, folder, "offline")


def open_wandb(config: Config, folder: Path, mode: str) -> Logger:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "clipft"),
        name=config.name,
        id=run_id(folder),
        resume="allow",
        dir=folder,
        mode=mode,  # pyright: ignore[reportArgumentType]
        config=readable(config),
        settings=wandb.Settings(init_timeout=WAIT_S, finish_timeout=FINISH_S, silent=True),
    )
    return WandbLogger(experiment=run)


def run_id(folder: Path) -> str:
    """The id under which a resumed run goes on in the same wandb run."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text()


def has_key() -> bool:
    """Whether wandb has a key: in the environment, or in the netrc that `wandb login` writes."""
    import netrc

    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in host for host in hosts)


def log_end(logger: Logger, results: dict[str, Any], retrievals: Sequence[Retrieved]) -> None:
    """Adds the before/after table and the sample retrievals, and closes the logger."""
    columns = [name for name in ("base", "best", "last") if name in results]
    metrics = list(dict.fromkeys(metric for name in columns for metric in results[name]))
    rows = [[metric, *(results[name].get(metric) for name in columns)] for metric in metrics]
    if isinstance(logger, WandbLogger):
        log_tables_to_wandb(logger, ["metric", *columns], rows, retrievals)
    elif isinstance(logger, TensorBoardLogger):
        lines = [["metric", *columns], ["---"] * (1 + len(columns)), *rows]
        logger.experiment.add_text("results", "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))
        for number, each in enumerate(retrievals):
            logger.experiment.add_image(f"found/{each.caption}", each.found[0], number, dataformats="HWC")
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()  # which Lightning leaves to the end of the process


def log_tables_to_wandb(
    logger: WandbLogger, columns: list[Any], rows: list[Any], retrievals: Sequence[Retrieved]
) -> None:
    import wandb

    logger.experiment.log({"results": wandb.Table(columns=columns, data=rows)})
    if retrievals:
        names: list[Any] = [
            "caption",
            "rank of its image",
            "its image",
            *(f"found {n + 1}" for n in range(len(retrievals[0].found))),
        ]
        table = wandb.Table(columns=names)
        for each in retrievals:
            table.add_data(each.caption, each.rank, *(wandb.Image(pixels) for pixels in [each.own, *each.found]))
        # A table's pictures travel in an artifact, outside the folder of an offline run; these lie inside.
        first = [wandb.Image(each.found[0], caption=each.caption) for each in retrievals]
        logger.experiment.log({"retrievals": table, "found_first": first})
    logger.experiment.finish()


def readable(config: Config) -> dict[str, Any]:
    """The config as plain values, without what looks like a secret."""
    node = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(node, dict)
    return redact(node)


def redact(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: "***" if SECRET.search(str(key)) and value else redact(value) for key, value in node.items()}
    return [redact(item) for item in node] if isinstance(node, list) else node
