"""Names of architectures and weight tags, from open_clip's files: importing it takes over ten seconds."""

import ast
import difflib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from clipft.config import ModelConfig

OURS = Path(__file__).parent / "architectures"
RUN_FILES = ("config.yaml", "checkpoints")
FOLDER_CONFIG = "open_clip_config.json"


def open_clip_dir() -> Path:
    """The installed open_clip's folder, found without importing it."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("open_clip is not installed. Run: pip install open_clip_torch")
    return Path(spec.submodule_search_locations[0])


@cache
def architecture_files() -> dict[str, Path]:
    """Config file of every architecture; ours win over those that open_clip may add under the same name."""
    paths = [*(open_clip_dir() / "model_configs").glob("*.json"), *OURS.glob("*.json")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.parent == OURS)}


def architecture_names() -> list[str]:
    return sorted(architecture_files(), key=str.lower)


def architecture_cfg(architecture: str) -> dict:
    """The architecture's model_cfg as its file has it."""
    return json.loads(architecture_files()[architecture].read_text(encoding="utf-8"))


def call_keywords(node: ast.expr) -> dict[str, ast.expr]:
    """Entries of a literal `dict(a=...)`, `{"a": ...}` or `_pcfg(a=...)`."""
    if isinstance(node, ast.Call):
        return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        entries = zip(node.keys, node.values, strict=True)
        return {str(key.value): value for key, value in entries if isinstance(key, ast.Constant)}
    raise AssertionError(f"unexpected {type(node).__name__} in open_clip/pretrained.py")


@cache
def pretrained_tags() -> dict[str, list[str]]:
    """Weight tags of every architecture, from the assignments in open_clip/pretrained.py."""
    source = (open_clip_dir() / "pretrained.py").read_text(encoding="utf-8")
    values: dict[str, ast.expr] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    tags: dict[str, list[str]] = {}
    for architecture, node in call_keywords(values["_PRETRAINED"]).items():
        entries = call_keywords(values[node.id] if isinstance(node, ast.Name) else node)
        tags[architecture] = list(entries)
        # open_clip lists the tags trained with QuickGELU a second time, under the architecture's twin.
        quick = [tag for tag, entry in entries.items() if "quick_gelu" in call_keywords(entry)]
        if quick:
            tags[f"{architecture}-quickgelu"] = quick
    return tags


def tags_of(architecture: str) -> list[str]:
    """Weight tags of the architecture; empty where it has none."""
    return list(pretrained_tags().get(architecture, []))


def clean_tag(tag: str) -> str:
    """The spelling in open_clip's table, which takes hyphens and capitals too."""
    return tag.lower().replace("-", "_")


def closest(word: str, choices: list[str]) -> str:
    """ "A, B or C": the choices nearest to the word, whatever its case and separators."""
    plain = {choice.lower().replace("_", "-").replace("/", "-"): choice for choice in choices}
    asked = word.lower().replace("_", "-").replace("/", "-")
    found = [plain[name] for name in difflib.get_close_matches(asked, list(plain), n=3, cutoff=0.5)]
    return " or ".join(", ".join(found).rsplit(", ", 1))


def kind_of(name: str) -> str:
    """ "architecture", "run" (a run directory) or "folder" (a local open_clip directory)."""
    if name in architecture_files():
        return "architecture"
    if name.startswith("hf-hub:"):
        raise ValueError(
            f"model.name={name!r}: hub ids are not read yet. Download the repository into a folder "
            f"(hf download {name.removeprefix('hf-hub:')} --local-dir FOLDER) and use model=FOLDER."
        )
    path = Path(name.removeprefix("local-dir:"))
    if all((path / file).exists() for file in RUN_FILES):
        return "run"
    if (path / FOLDER_CONFIG).is_file():
        return "folder"
    if path.is_dir():
        raise ValueError(
            f"model.name={name!r} is neither a run directory (with {' and '.join(RUN_FILES)}) "
            f"nor an open_clip directory (with {FOLDER_CONFIG})."
        )
    near = closest(name, architecture_names())
    hint = f"Did you mean {near}?" if near else "`open_clip.list_models()` lists what open_clip has."
    raise ValueError(f"model.name={name!r} is no architecture, run directory or open_clip directory. {hint}")


def starts_random(config: ModelConfig) -> bool:
    """Whether the model has no trained weights to start from."""
    return kind_of(config.name) == "architecture" and config.pretrained is None


def check_tag(architecture: str, tag: str) -> None:
    tags = tags_of(architecture)
    if clean_tag(tag) in tags:
        return
    if not tags:
        raise ValueError(
            f"model.pretrained={tag!r}: there are no weights for {architecture}. "
            "Use model.pretrained=null to start from random weights."
        )
    near = closest(tag, tags)
    hint = f"Did you mean {near}? " if near else ""
    raise ValueError(f"model.pretrained={tag!r} is no tag of {architecture}. {hint}Its tags: {', '.join(tags)}.")


def check_towers(name: str, model_cfg: dict) -> None:
    """Raise for towers that cannot be built here."""
    if "multimodal_cfg" in model_cfg:
        raise ValueError(
            f"model.name={name!r} is a CoCa model (it also writes captions); clipft trains two-tower models."
        )
    text = model_cfg["text_cfg"]
    foreign = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if foreign and find_spec("transformers") is None:
        raise ValueError(
            f"model.name={name!r} uses {foreign} of transformers. Run: pip install transformers sentencepiece"
        )


def check_model(config: ModelConfig) -> None:
    """Raise for a name, tag or combination that cannot be loaded; imports nothing heavy."""
    if kind_of(config.name) == "architecture":
        check_towers(config.name, architecture_cfg(config.name))
        if config.checkpoint != "best":
            raise ValueError(
                f"model.checkpoint={config.checkpoint!r} picks weights of a run directory, and "
                f"model.name={config.name!r} is an architecture. Leave it out."
            )
        if config.pretrained is not None:
            check_tag(config.name, config.pretrained)
        return
    if config.pretrained is not None:
        raise ValueError(
            f"model.pretrained={config.pretrained!r} would be ignored: the weights come from "
            f"model.name={config.name!r}. Leave model.pretrained out."
        )
    if kind_of(config.name) == "folder" and config.checkpoint != "best":
        raise ValueError(
            f"model.checkpoint={config.checkpoint!r} picks weights of a run directory, and "
            f"model.name={config.name!r} is an open_clip directory. Leave it out."
        )
