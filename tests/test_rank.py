"""What a rank does before it trains."""

import gc
import subprocess
import sys

import pytest

from clipft.rank import without, without_collection

TIMM = """
import sys
from clipft.rank import without
with without("wandb"):
    import timm.utils.summary
assert "wandb" not in sys.modules and not hasattr(timm.utils.summary, "wandb")
import wandb
assert wandb.__version__
"""


def test_nothing_is_collected_while_modules_are_imported():
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


def test_a_package_is_away_for_a_while_and_then_as_it_was(monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with without("wave"), pytest.raises(ImportError):
        import wave
    import wave

    with without("wave"):
        assert sys.modules["wave"] is wave  # one that is there stays


@pytest.mark.process
def test_timm_does_without_wandb_which_a_logger_may_still_want():
    subprocess.run([sys.executable, "-c", TIMM], check=True, timeout=120)
