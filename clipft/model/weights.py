"""Weight files -> tensors under names; nothing in a file is ever run, whatever wrote it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clipft.model.forms import NUMPY, PICKLE, SAFETENSORS, STATE, TORCHSCRIPT, check_archive, form_of
from clipft.model.torchscript import read_torchscript

OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")  # beside the tensors of OpenAI's archives only
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, LightningModules


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, in fp32 where they were shorter, and what tells where they come from."""

    state: dict[str, Tensor]
    openai: bool
    """Whether the file is of the form that OpenAI alone has published: its models have QuickGELU."""
    mixed: bool
    """Whether it was a bare state dict with matrices in fp16 and the rest in fp32, as OpenAI's models save it."""
    average: bool = False
    """Whether they are the moving average that a run of ours measured."""


def read_weights(path: Path) -> Weights:
    """The weights in a file of any form but big_vision's; raises ValueError with the file and what is wrong with it."""
    form = form_of(path)
    content = read_content(path, form)
    trained = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
    found = content["state_dict"] if trained else content
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds a {type(found).__name__}, no weights by name.")
    openai = all(mark in found for mark in OPENAI_MARKS)
    state = without_wrappers({name: value for name, value in found.items() if name not in OPENAI_MARKS})
    if form == TORCHSCRIPT:
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        keys = ", ".join(list(found)[:8]) or "nothing"
        raise ValueError(f"{path} holds no weights by name: it has {keys}, and clipft looks for state_dict or tensors.")
    mixed = form in (STATE, PICKLE) and not trained and has_both_precisions(state.values())
    average = trained and "raw_state_dict" in content
    return Weights({name: as_float(value) for name, value in state.items()}, openai, mixed, average)


def read_content(path: Path, form: str, mapped: bool = False) -> Any:
    """What the file holds; `mapped` leaves tensors on the disk until they are used, for uncompressed archives only."""
    if form == NUMPY:
        raise ValueError(
            f"{path} has big_vision's names: say which model it is, model=ARCHITECTURE model.pretrained={path}."
        )
    if form in (STATE, TORCHSCRIPT):
        check_archive(path)
    if form == TORCHSCRIPT:
        return read_torchscript(path)
    try:
        if form == SAFETENSORS:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):  # about this machine, now; not about the file
        raise
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: it cannot be read as safetensors ({error}).") from error
    except Exception as error:  # torch raises half a dozen types
        raise ValueError(unreadable(path, error)) from error


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """The state without what training frameworks put before every name."""
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return without_wrappers({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def has_both_precisions(values: Iterable[Tensor]) -> bool:
    return {torch.float16, torch.float32} <= {value.dtype for value in values}


def as_float(value: Tensor) -> Tensor:
    """fp16 and bf16 as fp32: position embeddings are interpolated, and training starts, in that."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The model's weights in a training state of ours, under open_clip's names."""
    return read_content(path, STATE, mapped=True)["state_dict"]


def unreadable(path: Path, error: Exception) -> str:
    # torch puts advice on how to load it all the same before and after the cause.
    cause = re.search(r"WeightsUnpickler error: (.*?)(?: Please use|\n|$)", str(error))
    reason = cause[1] if cause else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return (
        f"{path} cannot be read as weights: damaged, or more than tensors is in it ({reason}). "
        "Where you trust the file, convert it: "
        'python -c "import torch; from safetensors.torch import save_file; '
        f"state = torch.load('{path}', map_location='cpu', weights_only=False); "
        "state = state.get('state_dict', state); "
        "save_file({name: value.clone() for name, value in state.items()}, 'weights.safetensors')\""
    )


def load_exactly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copies the weights in; every name and shape must agree."""
    differences = first_differences(model, state)
    if differences:
        raise ValueError(f"{path} holds the weights of another model: {differences}.")
    model.load_state_dict(state)


def first_differences(model: nn.Module, state: dict[str, Tensor]) -> str:
    """The first few names that only one side has or whose shapes differ; empty if all agree."""
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    found = [f"{name} is missing" for name in ours if name not in theirs]
    found += [f"{name} is not in the model" for name in theirs if name not in ours]
    both = [name for name in ours if name in theirs]
    found += [f"{name} is {theirs[name]}, not {ours[name]}" for name in both if ours[name] != theirs[name]]
    rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + rest
