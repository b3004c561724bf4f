"""What a name given as model= or model.pretrained= stands for; neither torch nor open_clip is imported."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config import ModelConfig
from clipft.model.forms import SUFFIXES
from clipft.model.hub import CONFIG_NAMES, HUB, WEIGHT_NAMES
from clipft.model.names import architecture_files, architecture_names, clean_tag, closest, tags_of

RUN_FILES = ("config.yaml", "checkpoints")
RUN_CONFIG = "model.json"  # of a run directory: the same content as open_clip_config.json
FOLDER_CONFIG = CONFIG_NAMES[0]
FOLDER_WEIGHTS = (*WEIGHT_NAMES, "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "model.pth")


@dataclass(frozen=True)
class Local:
    """Weights on this machine, and the description of their model where there is one."""

    weights: Path
    description: Path | None
    said: str


def kind_of(name: str) -> str:
    """ "architecture", "hub" (hf-hub:org/name), "run" (a run directory), "folder" (an open_clip one) or "file"."""
    if name in architecture_files():
        return "architecture"
    if name.startswith(HUB):
        return "hub"
    if kind := kind_of_path(name):
        return kind
    if Path(name).is_dir():
        raise ValueError(f"model.name={name!r} {neither(Path(name))}")
    if looks_like_path(name):
        raise ValueError(f"model.name={name!r} does not exist.{near_files(Path(name))}")
    near = closest(name, architecture_names())
    hint = f"Did you mean {near}?" if near else "`clipft models` lists all architectures."
    raise ValueError(f"model.name={name!r} is no architecture, file, run directory or open_clip directory. {hint}")


def kind_of_path(name: str) -> str | None:
    """ "run", "folder" or "file"; None where nothing of that kind is there."""
    path = plain_path(name)
    if all((path / file).exists() for file in RUN_FILES):
        return "run"
    if (path / FOLDER_CONFIG).is_file():
        return "folder"
    return "file" if path.is_file() else None


def plain_path(name: str) -> Path:
    return Path(name.removeprefix("local-dir:"))


def neither(path: Path) -> str:
    there = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
    hint = f" A file in it can be given by itself: {', '.join(there[:3])}." if there else ""
    return (
        f"is neither a run directory (with {' and '.join(RUN_FILES)}) nor an open_clip directory (with "
        f"{FOLDER_CONFIG}).{hint}"
    )


def looks_like_path(name: str) -> bool:
    return "/" in name or Path(name).suffix in SUFFIXES


def near_files(path: Path) -> str:
    """ " Did you mean ...?" with files of about that name beside where it should be."""
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    names = [other.name for other in folder.iterdir()]
    found = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(str(folder / name) for name in found)}?" if found else ""


def repo_of(name: str) -> str:
    """The repository of hf-hub:org/name."""
    repo = name.removeprefix(HUB)
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"model.name={name!r}: a repository of the hub is written {HUB}org/name.")
    return repo


def starts_random(config: ModelConfig) -> bool:
    """Whether the model has no trained weights to start from."""
    return kind_of(config.name) == "architecture" and config.pretrained is None


def is_tag(architecture: str, pretrained: str) -> bool:
    return clean_tag(pretrained) in tags_of(architecture)


def base_run(config: ModelConfig) -> Path | None:
    """The run directory that the weights come from, if they do."""
    name = config.name if kind_of(config.name) != "architecture" else config.pretrained
    if name is None or is_tag(config.name, name):
        return None
    path = plain_path(name)
    for folder in (path, path.parent.parent):  # the run itself, a state of it
        if kind_of_path(str(folder)) == "run" and (path == folder or path.is_file()):
            return folder
    return None


def local(name: str, checkpoint: str) -> Local | None:
    """What a run directory, an open_clip directory or a file holds; None for what is none of these."""
    path, kind = plain_path(name), kind_of_path(name)
    if kind == "run":
        stem = f"step-{int(checkpoint):08d}" if checkpoint.isdigit() else checkpoint
        return Local(state_of_run(path, stem), path / RUN_CONFIG, f"{checkpoint} of the run {path}")
    if kind == "folder":
        weights = folder_weights(path)
        return Local(weights, path / FOLDER_CONFIG, f"{weights.name} of {path}")
    if kind == "file":
        return Local(path, beside(path.absolute()), str(path))
    return None


def beside(path: Path) -> Path | None:
    """The description of a weight file that lies in a run or in an open_clip directory."""
    run, folder = path.parent.parent / RUN_CONFIG, path.parent / FOLDER_CONFIG
    if path.parent.name == RUN_FILES[1] and run.is_file():
        return run
    return folder if folder.is_file() else None


def state_of_run(run: Path, stem: str) -> Path:
    path = run / "checkpoints" / f"{stem}.ckpt"
    if not path.is_file():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.ckpt"))) or "none"
        raise ValueError(f"model.checkpoint: {path} does not exist. In {path.parent} there are: {there}.")
    return path


def folder_weights(folder: Path) -> Path:
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} has no weights: put one of {', '.join(FOLDER_WEIGHTS[:3])} beside {FOLDER_CONFIG}, or give the file "
        "itself, which is then described by it."
    )


def read_description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two halves of open_clip_config.json or model.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - content["model_cfg"].keys()
        model_cfg, preprocess_cfg = content["model_cfg"], content.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} must be JSON with "model_cfg" and "preprocess_cfg": {error!r}.') from error
    if missing:
        raise ValueError(f'{path} must be JSON with "model_cfg" of a CLIP: {", ".join(sorted(missing))} missing.')
    return model_cfg, preprocess_cfg
