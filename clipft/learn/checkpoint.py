"""Training states on disk: never half-written under their final name, never unpickled without restriction."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, renames; loads tensors and plain containers only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises half a dozen types for a damaged file
            raise ValueError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or not one of ours. "
                f"Use another one, or resume=restart to begin again."
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def saved_step(path: Path) -> int:
    """The step of a saved state; 0 where there is none."""
    if not path.exists():
        return 0
    return AtomicCheckpointIO().load_checkpoint(path)["clipft"]["step"]


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.ckpt"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the saved states, oldest first."""
    names = (re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("step-*.ckpt"))
    return sorted(int(match[1]) for match in names if match)


def point(folder: Path, name: str, target: Path) -> None:
    """Makes folder/name.ckpt the same file as `target`, at once and without a moment in which it is missing."""
    temporary = folder / f".{name}.ckpt.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:  # file systems without hard links
        shutil.copyfile(target, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, folder / f"{name}.ckpt")


def forget_old(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` saved states; last.ckpt and best.ckpt are names of their own."""
    for step in saved_steps(folder)[:-keep]:
        step_path(folder, step).unlink(missing_ok=True)
