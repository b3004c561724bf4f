"""One model, one data set, and one calm run for each way to train, for all tests of faults."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import go
from small import make_config, make_data, make_model

from clipft.config import Config

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]  # /proc, fork, tmpfs
Make = Callable[..., Config]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function of a name and overrides: the config of a run of 14 steps, of which 12 are an epoch."""
    root = tmp_path_factory.mktemp("faults")
    make_model(root / "model")
    make_data(root / "data", num_train=97, damaged=2)
    base = ("train.max_steps=14", "eval.every=6", "optim.eps=1e-6", "trainer.accelerator=cpu")
    return lambda name, *overrides: make_config(root, f"name={name}", *base, *overrides)


@pytest.fixture(scope="session")
def calm(make: Make) -> Callable[..., Path]:
    """A function of overrides: the folder of such a run that nothing disturbed."""
    folders: dict[tuple[str, ...], Path] = {}

    def undisturbed(*overrides: str) -> Path:
        if overrides not in folders:
            ended = go(make(f"calm-{len(folders)}", *overrides))
            assert ended.code == 0, ended.stderr
            folders[overrides] = ended.path
        return folders[overrides]

    return undisturbed
