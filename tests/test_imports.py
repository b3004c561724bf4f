"""Design rules that a reader may rely on."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "clipft"
# Imports point from a later place to an earlier one, or stay within one.
ORDER = ["config", "conf_files", "files", "report", "data", "model", "learn", "judge", "ship", "guide", "encoder"]
ORDER += [
    "examples",
    "rundir",
    "ranks",
    "plan",
    "capacity",
    "measure",
    "fit",
    "frozen",
    "run",
    "rank",
    "launch",
    "arguments",
]
ORDER += ["sweep", "cli", "bench"]
PURE = {
    "learn/losses.py",
    "learn/schedule.py",
    "learn/gather.py",
    "data/order.py",
    "judge/retrieval.py",
    "judge/zero_shot.py",
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def place_of(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def imports(file: str) -> set[str]:
    """Full names of the modules that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own(names: set[str]) -> set[str]:
    """The places of ours that these modules belong to."""
    return {part for name in names if name.startswith("clipft.") and (part := name.split(".")[1]) in ORDER}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    here = ORDER.index(place_of(file))
    later = [name for name in own(imports(file)) if ORDER.index(name) > here]
    assert not later, f"{file} imports {later}"


@pytest.mark.parametrize("file", sorted(PURE))
def test_pure_maths_sees_neither_config_nor_lightning(file):
    assert not any(
        name.startswith(("clipft.config", "pytorch_lightning", "lightning", "omegaconf")) for name in imports(file)
    )


def test_no_config_can_run_code():
    """But for the one place where Hydra is told the name of our sweeper."""
    texts = [path.read_text() for path in (PACKAGE.parent / "conf").rglob("*.yaml")]
    texts += [(PACKAGE / file).read_text() for file in FILES if file != "sweep/sweeper.py"]
    assert not any("_target_" in text for text in texts)
    assert (PACKAGE / "sweep" / "sweeper.py").read_text().count("_target_") == 1
