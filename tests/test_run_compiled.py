"""Whole runs with train.compile."""

from functools import partial
from pathlib import Path

import pytest
import torch
from alone import alone
from small import MODEL_CFG, make_config, make_data, make_model, outcome, train_here
from torch.testing import assert_close

from clipft import fit, run
from clipft.config import ExportConfig
from clipft.model.compiled import compiled_blocks, lacking

TWO_LAYERS = {name: value | {"layers": 2} if "cfg" in name else value for name, value in MODEL_CFG.items()}
CONSTANT = ("optim.schedule=constant", "optim.warmup_frac=0")  # so that the number of steps does not matter
compiler = pytest.mark.skipif(bool(lacking(torch.device("cpu"))), reason=f"no {lacking(torch.device('cpu'))}")
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model", TWO_LAYERS)
    make_data(folder / "data")
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_alike(found: Path, expected: Path) -> None:
    for ours, theirs in zip(outcome(found)["rows"], outcome(expected)["rows"], strict=True):
        assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-4)
    assert_close(weights(found), weights(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@compiler
@alone
def test_a_run_with_compiled_blocks_is_like_one_without_also_where_it_goes_on(root, monkeypatch):
    """With micro-batches of two sizes, averages, other rates for a tower, recomputed activations, and an export."""
    monkeypatch.setattr(fit, "compiled_blocks", partial(compiled_blocks, "aot_eager"))
    tuned = ["train.ema=0.5", "train.micro_batch=3", "tune.layer_decay.text=0.5", *CONSTANT]
    _, plain = train_here(make_config(root, "name=plain", *tuned))
    compiled = ["name=compiled", "train.compile=true", "model.grad_checkpointing=true", *tuned]
    assert train_here(make_config(root, *compiled, "train.max_steps=4"))[0] == 0
    code, path = train_here(make_config(root, *compiled, "resume=force"))
    assert code == 0 and len(outcome(path)["rows"]) == 6
    assert_alike(path, plain)
    assert "tower are compiled" in (path / "log.txt").read_text()
    assert run.export(ExportConfig(run=str(path))) == 0


@pytest.mark.slow
@compiler
@alone
def test_inductor_gives_the_losses_and_weights_of_a_plain_run(root):
    _, plain = train_here(make_config(root, "name=plain-eager"))
    code, path = train_here(make_config(root, "name=inductor", "train.compile=true"))
    assert code == 0
    assert_alike(path, plain)
