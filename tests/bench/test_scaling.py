import pytest
import torch

from clipft.bench.scaling import GATHER, counted, predicted

BATCH = 8


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_sends_what_the_formulas_say(world):
    """Which also halves the bytes of the features where they are bf16: their formula does."""
    for dtype in (None, torch.bfloat16):
        sent, model = counted(world, BATCH, dtype)
        expected = predicted(world, BATCH, dtype, **model)
        for kind in {each.kind for each in sent + expected}:
            ours, theirs = ([each.bytes for each in some if each.kind == kind] for some in (sent, expected))
            assert len(ours) == len(theirs) and sum(ours) == sum(theirs)
            assert kind != GATHER or ours == theirs  # one by one, in their order
        assert bool(sent) == (world > 1)
