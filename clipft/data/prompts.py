"""Prompt templates for the classes of a labelled set."""

import runpy
from importlib.util import find_spec
from pathlib import Path

NAMES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def templates_of(asked: list[str] | str) -> list[str]:
    """The templates as texts with {c} for the class; a name stands for those of open_clip, which is not imported."""
    if isinstance(asked, list):
        return asked
    spec = find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations is not None
    found = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "zero_shot_metadata.py"))
    return [template("{c}") for template in found[NAMES[asked]]]
