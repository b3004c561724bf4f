"""Names of architectures and weight tags, from open_clip's files: importing it takes over ten seconds."""

import ast
import difflib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

OURS = Path(__file__).parent / "architectures"


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
def pretrained_tags() -> dict[str, dict[str, str]]:
    """Weight tags of every architecture, each with its place on the hub ("org/name/" or "org/name/file").

    Read from the assignments in open_clip/pretrained.py.
    """
    source = (open_clip_dir() / "pretrained.py").read_text(encoding="utf-8")
    values: dict[str, ast.expr] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    tags: dict[str, dict[str, str]] = {}
    for architecture, node in call_keywords(values["_PRETRAINED"]).items():
        entries = call_keywords(values[node.id] if isinstance(node, ast.Name) else node)
        found = {tag: call_keywords(entry) for tag, entry in entries.items()}
        tags[architecture] = {tag: text_in(fields["hf_hub"]) for tag, fields in found.items()}
        # open_clip lists the tags trained with QuickGELU a second time, under the architecture's twin.
        quick = {tag: tags[architecture][tag] for tag, fields in found.items() if "quick_gelu" in fields}
        if quick:
            tags[f"{architecture}-quickgelu"] = quick
    return tags


def text_in(node: ast.expr) -> str:
    assert isinstance(node, ast.Constant), "open_clip/pretrained.py computes a place on the hub"
    return str(node.value)


def tags_of(architecture: str) -> list[str]:
    """Weight tags of the architecture; empty where it has none."""
    return list(pretrained_tags().get(architecture, {}))


def clean_tag(tag: str) -> str:
    """The spelling in open_clip's table, which takes hyphens and capitals too."""
    return tag.lower().replace("-", "_")


def closest(word: str, choices: list[str]) -> str:
    """ "A, B or C": the choices nearest to the word, whatever its case and separators."""
    plain = {choice.lower().replace("_", "-").replace("/", "-"): choice for choice in choices}
    asked = word.lower().replace("_", "-").replace("/", "-")
    found = [plain[name] for name in difflib.get_close_matches(asked, list(plain), n=3, cutoff=0.5)]
    return " or ".join(", ".join(found).rsplit(", ", 1))
