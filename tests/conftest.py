import os

os.environ.pop("CLIPFT_TRACEBACK", None)
os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked, and a pool of threads does not come along

import pytest
import torch

torch.set_num_threads(1)

ONLY_WHEN_NAMED = ("fault", "slow", "gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that run only when -m names their mark, whatever else -m says."""
    named = str(config.getoption("-m"))
    closed = {mark for mark in ONLY_WHEN_NAMED if mark not in named}
    left_out = [item for item in items if closed & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
