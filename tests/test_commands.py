"""evaluate, export and data pack, with each of their options."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import make_config, make_world, train_here

from clipft import run
from clipft.cli import main
from clipft.config import DataConfig, EvaluateConfig, ExportConfig, ModelConfig, TrainerConfig
from clipft.model.weights import read_checkpoint
from clipft.ranks import joined
from clipft.rundir import read_results

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    assert train_here(make_config(folder, "name=trained"))[0] == 0
    return folder


def evaluated(root: Path, model: str = "runs/trained", **options) -> dict[str, float]:
    """The metrics that the command writes to its `out`."""
    config = EvaluateConfig(
        model=ModelConfig(name=str(root / model), pretrained=None),
        data=DataConfig(path=str(root / "data" / "packed"), name="squares", workers=0),
        out=str(root / "out.json"),
        **options,
    )
    with joined(TrainerConfig(accelerator="cpu")) as ranks:
        assert run.evaluate(config, ranks) == 0
    return json.loads((root / "out.json").read_text())["model"]


def test_evaluate_repeats_the_numbers_of_the_run(root, capsys):
    assert evaluated(root) == read_results(root / "runs" / "trained")["best"]
    assert "squares, test split: 12 images, 24 captions" in capsys.readouterr().out
    assert evaluated(root, "model") == read_results(root / "runs" / "trained")["base"]


def test_evaluates_options_change_what_is_measured(root):
    plain = evaluated(root)
    assert evaluated(root, split="train") != plain
    assert evaluated(root, relevance="pair") != plain
    assert evaluated(root, batch_size=5) == pytest.approx(plain)
    with pytest.raises(ValueError, match="split='test'"):
        config = EvaluateConfig(
            model=ModelConfig(name=str(root / "model"), pretrained=None),
            data=DataConfig(train=str(root / "data" / "packed" / "train-*.tar")),
            split="test",
        )
        with joined(TrainerConfig(accelerator="cpu")) as ranks:
            run.evaluate(config, ranks)


def test_an_export_loads_in_plain_open_clip_with_the_features_that_were_measured(root, capsys):
    out = root / "exported"
    assert run.export(ExportConfig(run=str(root / "runs" / "trained"), checkpoint="last", out=str(out))) == 0
    assert "Loaded again by plain open_clip" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    card = (out / "README.md").read_text()
    assert "squares/text_to_image_recall@1" in card and "local-dir:" in card and str(root) not in card
    code = (
        "import sys, open_clip\n"
        "model, _, _ = open_clip.create_model_and_transforms('local-dir:' + sys.argv[1], require_pretrained=True)\n"
        "assert 'clipft' not in sys.modules\n"
        "print(float(model.logit_scale))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) != pytest.approx(2.6592, abs=1e-4)  # the value before training


def test_a_given_step_is_exported(root):
    out = root / "step"
    assert run.export(ExportConfig(run=str(root / "runs" / "trained"), checkpoint="4", out=str(out))) == 0
    last = root / "exported" / "open_clip_model.safetensors"
    assert (out / "open_clip_model.safetensors").read_bytes() != last.read_bytes()


def test_a_run_that_is_called_like_an_architecture_is_exported_and_not_that_architecture(root, tmp_path, monkeypatch):
    shutil.copytree(root / "runs" / "trained", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert run.export(ExportConfig(run="tiny")) == 0
    trained = read_checkpoint(tmp_path / "tiny" / "checkpoints" / "best.ckpt")
    exported = load_file(tmp_path / "tiny" / "export" / "open_clip_model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in trained.items())


def test_what_cannot_be_exported_is_said_before_any_rank_starts(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clipft.launch.launch", lambda *_: pytest.fail("a rank was started"))
    trained = f"run={root}/runs/trained"
    (tmp_path / "config.yaml").touch()
    for arguments, said in (
        ([f"run={tmp_path}"], "is no run directory (with config.yaml and checkpoints/)"),
        ([trained, "checkpoint=9"], "checkpoint"),
        ([f"run={tmp_path}", "data.allow_pipe=true"], "is no run directory"),
    ):
        assert main(["export", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_pack_reads_a_folder_and_its_options(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = root / "data" / "source"
    arguments = ["data", "pack", f"source={source}", "out=packed", "shard_samples=10", "templates=['a {c} thing']"]
    assert main(arguments) == 0
    assert "40" in capsys.readouterr().out
    assert len(list((tmp_path / "packed").glob("train-*.tar"))) == 4
    assert (tmp_path / "packed" / "zeroshot_classification_templates.txt").read_text() == "a {c} thing\n"
