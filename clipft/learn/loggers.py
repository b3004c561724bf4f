"""Trackers beside metrics.csv. They never end or stall a run, and nothing leaves the machine unasked."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from clipft.config import Config

WAIT_S = 10.0  # for a server that does not answer
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def build_loggers(config: Config, folder: Path) -> list[Logger]:
    if config.logger == "tensorboard":
        return [build_tensorboard(config, folder)]
    return [build_wandb(config, folder)] if config.logger == "wandb" else []


def build_tensorboard(config: Config, folder: Path) -> Logger:
    try:
        logger = TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs a package. Run: pip install tensorboard") from error
    logger.log_hyperparams(readable(config))
    return logger


def build_wandb(config: Config, folder: Path) -> Logger:
    """A wandb run in the run's folder; offline where there is no key or the server does not answer."""
    import wandb

    offline = os.environ.get("WANDB_MODE") == "offline" or not has_key()
    try:
        logger = open_wandb(config, folder, offline)
    except (wandb.Error, OSError) as error:
        warnings.warn(f"wandb cannot be reached ({error}); this run is logged offline.", stacklevel=2)
        logger = open_wandb(config, folder, offline=True)
    return logger


def open_wandb(config: Config, folder: Path, offline: bool) -> Logger:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "clipft"),
        name=config.name,
        dir=folder,
        mode="offline" if offline else None,
        config=readable(config),
        settings=wandb.Settings(init_timeout=WAIT_S, silent=True),
    )
    return WandbLogger(experiment=run)


def has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def readable(config: Config) -> dict[str, Any]:
    """The config as plain values, without what looks like a secret."""
    node = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(node, dict)
    return redact(node)


def redact(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: "***" if SECRET.search(str(key)) and value else redact(value) for key, value in node.items()}
    return [redact(item) for item in node] if isinstance(node, list) else node
