"""Training states on disk: whole under their final name or not there, checked before use, never unpickled freely."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from clipft.files import replace_file
from clipft.model.weights import check_archive, first_differences

SAID = {"step", "best_step", "best_value", "since_best", "select", "ledger", "trained_by"}  # by each state of itself
MANIFEST = "manifest.json"  # what is known of each state, for people and tools; loading does not depend on it


class HashingFile:
    """Passes bytes on to a file and keeps the hash of what was meant to be written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.refused: OSError | None = None

    def write(self, raw: bytes | memoryview) -> int:
        self.sha256.update(raw)
        try:
            return self.file.write(raw)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_state(state: dict[str, Any], target: Path) -> str:
    """Writes beside the target, reads it back, renames; returns the sha256. A failure leaves what was there before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as raw:
            file = HashingFile(raw)
            try:
                torch.save(state, file)  # pyright: ignore[reportArgumentType] -- write and flush are all it uses
            except RuntimeError as error:  # torch does not pass on what the disk has said
                raise file.refused or error from error
            file.flush()
            os.fsync(raw.fileno())
        with temporary.open("rb") as raw:
            written = hashlib.file_digest(raw, "sha256").hexdigest()
        if written != file.sha256.hexdigest():
            raise OSError(f"{temporary} does not read back as it was written: the disk is not to be trusted")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    return written


def read_state(path: Path) -> dict[str, Any]:
    """The state, with every byte checked; raises ValueError for a file that is damaged or none of ours."""
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {"clipft", "state_dict", "optimizer_states"} - state.keys():
            raise KeyError("clipft, state_dict or optimizer_states is missing")
    except (OSError, MemoryError):  # about this machine, now; not about the file
        raise
    except Exception as error:  # torch raises half a dozen types for what is not its own
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} is none of our training states ({type(error).__name__}: {reason}).") from error
    if missing := SAID - state["clipft"].keys():
        raise ValueError(f"{path} was written by another version of clipft: it has no {', '.join(sorted(missing))}.")
    return state


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Found:
    """Where a run stands."""

    step: int = 0
    path: str | None = None
    """The state to go on from; None: from the beginning."""
    notes: list[str] = field(default_factory=list)
    """What was found damaged, and what is used in its place."""
    best: bool = True
    """Whether best.ckpt can be used, where there should be one."""
    said: dict[str, Any] = field(default_factory=dict)
    """What the state says of itself."""


def find_state(folder: Path, model: nn.Module) -> Found:
    """The newest state that is whole and of this model; once one is found, those that are not are put aside."""
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    candidates = [path for path in [*reversed(step_paths(folder)), last, best] if path.exists()]
    problems: dict[Path, str] = {}
    for path in candidates:
        try:
            state = state_of(path, model)
        except ValueError as error:
            problems[path] = str(error)
            continue
        return go_on_from(path, state, best_step_of(best, path, state, model, problems), problems)
    if candidates or any(folder.glob("*.damaged")):
        raise ValueError(
            f"{folder} has no state to go on from: {' '.join(problems.values())} Use resume=restart to begin again, or "
            "put an undamaged copy there as last.ckpt."
        )
    return Found()


def state_of(path: Path, model: nn.Module) -> dict[str, Any]:
    """What the state says of itself; raises, in one sentence, when it cannot be used for this model."""
    state = read_state(path)
    if differences := first_differences(model, state["state_dict"]):
        raise ValueError(f"{path} holds the weights of another model: {differences}.")
    return state["clipft"]


def best_step_of(
    best: Path, found: Path, state: dict[str, Any], model: nn.Module, problems: dict[Path, str]
) -> int | None:
    """The step of best.ckpt, None where it is not there or cannot be used, which then is one of the problems."""
    if not best.exists() or best.samefile(found):
        return state["step"] if best.exists() else None
    try:
        return state_of(best, model)["step"]
    except ValueError as error:
        problems[best] = str(error)
        return None


def go_on_from(path: Path, state: dict[str, Any], best_step: int | None, problems: dict[Path, str]) -> Found:
    """Makes last.ckpt this state, and best.ckpt what the state says, where a kill or damage has left them otherwise."""
    folder, last, notes = path.parent, path.parent / "last.ckpt", []
    for bad, problem in problems.items():
        aside = bad.with_name(f"{bad.name}.damaged")
        os.replace(bad, aside)
        notes.append(f"{problem} It is now called {aside.name}.")
    if not (last.exists() and last.samefile(path)):
        point(folder, "last", path)
    if problems:
        notes.append(f"Going on from {path.name}, step {state['step']}.")
    best_is_there = best_step is not None and state["best_step"] in (0, best_step)
    if not best_is_there:
        point(folder, "best", path)
    best = best_is_there or state["best_step"] in (0, state["step"])
    return Found(state["step"], str(path), notes, best, state)


def said_by(path: Path) -> dict[str, Any]:
    """What a state says of itself, without its tensors being read."""
    return torch.load(path, weights_only=True, mmap=True)["clipft"]


def saved_step(path: Path) -> int:
    """The step of a saved state; 0 where there is none."""
    return said_by(path)["step"] if path.exists() else 0


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.ckpt"


def step_paths(folder: Path) -> list[Path]:
    """The saved states, oldest first."""
    return [step_path(folder, step) for step in saved_steps(folder)]


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


def clean(folder: Path) -> None:
    """Removes what a killed run was in the middle of writing; the folder must be locked."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def note_in_manifest(folder: Path, names: list[str], entry: dict[str, Any]) -> None:
    """Describes the state of these names in manifest.json; names whose files are gone leave it."""
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        entries = {}
    entries |= dict.fromkeys(names, entry | {"saved_at": f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"})
    entries = {name: value for name, value in sorted(entries.items()) if (folder / name).exists()}
    replace_file(path, json.dumps(entries, indent=1) + "\n")
