"""Options that change the model, and weights in other forms, through whole runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small import make_config, make_world, outcome, train_here
from torch.testing import assert_close
from weight_files import features, model

from clipft import run
from clipft.config import ExportConfig
from clipft.model.load import load_model
from clipft.rundir import read_results

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_sizes_and_patch_dropout_stay_through_a_stop_an_export_and_a_run_that_starts_from_there(root):
    import open_clip

    options = ["model.image_size=32", "model.context_length=10", "model.patch_dropout=0.5", "train.micro_batch=3"]
    config = make_config(root, "name=sized", *options)
    stopped = replace(config, train=replace(config.train, max_time="0.0001s"))
    assert train_here(stopped)[0] == 143
    code, path = train_here(config)
    assert code == 0 and outcome(path) == outcome(train_here(replace(config, name="calm"))[1])
    saved = json.loads((path / "model.json").read_text())
    assert (
        saved["model_cfg"]["vision_cfg"] | {"image_size": 32, "patch_dropout": 0.5} == saved["model_cfg"]["vision_cfg"]
    )
    assert saved["model_cfg"]["text_cfg"]["context_length"] == 10 and saved["preprocess_cfg"]["size"] == [32, 32]
    assert run.export(ExportConfig(run=str(path))) == 0
    plain = cast(Any, open_clip.create_model)(f"local-dir:{path / 'export'}", require_pretrained=True)
    clip = load_model(model(path), 0)
    assert plain.visual.image_size == (32, 32) and plain.context_length == 10
    assert_close(features(clip), features(clip, plain), rtol=0, atol=1e-6)
    base = make_config(root, "name=on-top", f"model.name={path}", "data.name=others", "train.max_steps=1")
    code, tuned = train_here(base)
    assert code == 0 and json.loads((tuned / "model.json").read_text()) == saved


@pytest.mark.parametrize("given", ["run", "state", "export"])
def test_an_architecture_takes_the_weights_of_a_run_and_forgetting_is_measured_on_its_data(root, given, tmp_path):
    if not (root / "runs" / "small").exists():
        config = make_config(root, "name=small", "model.name=small", "train.max_steps=1", "eval.base=false")
        assert train_here(config)[0] == 0 and run.export(ExportConfig(run=str(root / "runs" / "small"))) == 0
    path = root / "runs" / "small"
    places = {"run": path, "state": path / "checkpoints" / "best.ckpt", "export": path / "export"}
    options = [f"runs_dir={tmp_path}", f"name={given}", "data.name=others", "train.max_steps=1"]
    weights = ["model.name=small", f"model.pretrained={places[given]}"]
    code, tuned = train_here(make_config(root, *options, *weights))
    results = read_results(tuned)
    assert code == 0 and results["meta"]["base_model"] == {"name": "small", "pretrained": str(places[given])}
    names = {name.split("/")[0] for name in results["base"]}
    assert names == ({"others"} if given == "export" else {"others", "squares"})


def test_a_weight_file_alone_starts_a_run_from_the_command_line(root, tmp_path):
    torch.save({"epoch": 3, "state_dict": load_model(model("small"), 0).model.state_dict()}, tmp_path / "epoch_3.pt")
    arguments = [f"data.path={root}/data/packed", "data.name=squares", "data.workers=0", "train.batch_size=8"]
    words = [sys.executable, str(ROOT / "train.py"), "model=epoch_3.pt", *arguments, "train.max_steps=1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epoch_3.pt fits small by its shapes" in done.stdout
    assert (tmp_path / "runs" / "epoch_3-squares" / "results.json").exists()


@pytest.mark.parametrize("option", ["patch_dropout=0.5", "grad_checkpointing=true"])
def test_options_of_training_are_refused_where_nothing_is_trained(root, tmp_path, option):
    words = [sys.executable, "-c", "import sys; from clipft.cli import main; sys.exit(main())", "evaluate"]
    words += [f"model={root}/model", f"data={root}/data/packed", f"model.{option}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2 and f"model.{option.split('=')[0]}=" in done.stderr and "would be ignored" in done.stderr
    )
