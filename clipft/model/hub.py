"""Files of the Hugging Face hub: from its cache on this machine, else downloaded, else refused within seconds."""

import os
from collections.abc import Sequence
from pathlib import Path

REACH_S = 5.0  # huggingface_hub itself retries for over twenty seconds a file
HUB = "hf-hub:"
CONFIG_NAMES = ("open_clip_config.json",)
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Of open_clip's repositories, in the order that it tries them."""
LOCAL_DIR = "; or run `hf download {repo} --local-dir FOLDER`, copy FOLDER here and use model=FOLDER"
TOKENIZER_NAMES = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "vocab.txt")


def hub_files(place: str) -> tuple[str, tuple[str, ...]]:
    """A tag's repository and the files that may hold its weights ("org/name/" leaves the file's name open)."""
    repo, file = os.path.split(place)
    return repo, (str(Path(file).with_suffix(".safetensors")), file) if file else WEIGHT_NAMES


def find_file(repo: str, names: Sequence[str], what: str) -> Path:
    """The first of these files that the repository has; `what` begins the error, as in "model.pretrained='x'"."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    check_reach(repo, names, what)
    if cached := cached_file(repo, names):
        return cached
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the connection was lost on the way
                raise ValueError(missing(repo, names, what, f"the download failed: {error}")) from error
        except Exception as error:  # no such repository, no access, requests or httpx by version of huggingface_hub
            raise ValueError(missing(repo, names, what, f"the download failed: {error}")) from error
    raise ValueError(f"{what}: https://huggingface.co/{repo} has no {' and no '.join(names)}.")


def cached_file(repo: str, names: Sequence[str]) -> Path | None:
    """The first of these files that lies in the cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repo, name)
        if isinstance(found, str):
            return Path(found)
    return None


def check_reach(repo: str, names: Sequence[str], what: str) -> None:
    """Raises, within seconds, where none of the files is in the cache and the hub does not answer."""
    if cached_file(repo, names) is None and (reason := why_no_hub()):
        raise ValueError(missing(repo, names, what, reason))


def why_no_hub() -> str | None:
    """Why nothing can be downloaded; None if the hub answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_S)
    except Exception as error:  # requests or httpx, by version of huggingface_hub
        return f"{constants.ENDPOINT} does not answer ({error})"
    return None


def missing(repo: str, names: Sequence[str], what: str, reason: str) -> str:
    from huggingface_hub import constants

    files = f"{names[0]} (or {names[-1]})" if len(names) > 1 else names[0]
    return (
        f"{what}: {files} of https://huggingface.co/{repo} is not on this machine and {reason}. On a connected machine "
        f"run `hf download {repo}`, then copy the folder models--{repo.replace('/', '--')} of its Hugging Face cache "
        f"into {constants.HF_HUB_CACHE} here{LOCAL_DIR.format(repo=repo) if names != TOKENIZER_NAMES else ''}."
    )
