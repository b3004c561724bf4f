"""Weight files -> tensors in a model; a file that is missing, damaged or another model's is named."""

import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from clipft.model.encode import OpenClip

REACH_S = 5.0  # huggingface_hub itself retries for over twenty seconds a file


def find_tag_weights(architecture: str, tag: str, tag_cfg: dict) -> Path:
    """The tag's weight file: from the Hugging Face cache, else downloaded; never anything in its place."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip import download_pretrained

    repo, names = hub_files(tag_cfg)
    for name in names:
        cached = try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            return Path(cached)
    reason = why_no_hub()
    if reason is None:
        try:
            return Path(download_pretrained(tag_cfg))
        except Exception as error:  # requests, httpx, OSError, by version of huggingface_hub
            reason = f"the download failed: {error}"
    raise ValueError(missing_weights(architecture, tag, repo, names, reason))


def hub_files(tag_cfg: dict) -> tuple[str, list[str]]:
    """The tag's repository and the files that may hold its weights, in the order open_clip tries them."""
    repo, file = os.path.split(tag_cfg["hf_hub"])
    if not file:
        return repo, [
            "open_clip_model.safetensors",
            "open_clip_pytorch_model.safetensors",
            "open_clip_pytorch_model.bin",
        ]
    return repo, [str(Path(file).with_suffix(".safetensors")), file]


def why_no_hub() -> str | None:
    """Why nothing can be downloaded, found within seconds; None if the hub answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_S)
    except Exception as error:  # requests or httpx, by version of huggingface_hub
        return f"{constants.ENDPOINT} does not answer ({error})"
    return None


def missing_weights(architecture: str, tag: str, repo: str, names: list[str], reason: str) -> str:
    from huggingface_hub import constants

    return (
        f"model.pretrained={tag!r}: the weights of {architecture} are not on this machine and {reason}. "
        f"Needed: {names[0]} (or {names[-1]}) of https://huggingface.co/{repo}. On a connected machine run "
        f"`hf download {repo}`, then copy the folder models--{repo.replace('/', '--')} of its Hugging Face "
        f"cache into {constants.HF_HUB_CACHE} here; or run `hf download {repo} --local-dir FOLDER`, "
        f"copy FOLDER here and use model=FOLDER. To start from random weights instead: model.pretrained=null."
    )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The model's weights in a training state, under open_clip's names; never unpickles anything else."""
    if not path.is_file():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.ckpt"))) or "none"
        raise ValueError(f"model.checkpoint: {path} does not exist. In {path.parent} there are: {there}.")
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise ValueError(unreadable(path, error)) from error


def is_average(path: Path) -> bool:
    """Whether the weights in a training state are a moving average of those that were trained."""
    return "raw_state_dict" in torch.load(path, weights_only=True, mmap=True)


def check_archive(path: Path) -> None:
    """Raises unless every byte that torch.save wrote is there as it was (the zip format keeps a CRC of each part).

    torch.load itself does not look at them: a flipped bit in a tensor would load as another weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, MemoryError):  # about this machine, now; not about the file
        raise
    except Exception as error:  # zipfile raises half a dozen types, by where the damage lies
        size = path.stat().st_size
        raise ValueError(f"{path} is damaged: {size:,} bytes that are no whole archive ({error}).") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the bytes of {damaged} are not those that were written.")


def unreadable(path: Path, error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    kind = type(error).__name__
    return f"{path} cannot be read as this model's weights: damaged, or another's ({kind}: {first_line})."


def load_exactly(model: OpenClip, state: dict[str, Tensor], path: Path) -> None:
    """Copies the weights in; every name and shape must agree."""
    differences = first_differences(model, state)
    if differences:
        raise ValueError(f"{path} holds the weights of another model: {differences}.")
    model.load_state_dict(state)


def first_differences(model: OpenClip, state: dict[str, Tensor]) -> str:
    """The first few names that only one side has or whose shapes differ; empty if all agree."""
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    found = [f"{name} is missing" for name in ours if name not in theirs]
    found += [f"{name} is not in the model" for name in theirs if name not in ours]
    both = [name for name in ours if name in theirs]
    found += [f"{name} is {theirs[name]}, not {ours[name]}" for name in both if ours[name] != theirs[name]]
    rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + rest


def load_with_open_clip(model: OpenClip, path: Path) -> None:
    """Copies in weights that others published, in any of the forms that open_clip converts."""
    from open_clip import load_checkpoint

    try:
        load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:  # damaged file or another model's: torch, safetensors and open_clip each raise their own
        raise ValueError(unreadable(path, error)) from error
