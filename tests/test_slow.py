"""Promises that take minutes or a GPU to check: pytest -m slow, pytest -m gpu."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import make_config, make_data, make_model, train_here

from clipft.learn.metrics_file import read_rows

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_main_job_learns_to_find_held_out_scenes(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "train.py")], cwd=tmp_path, check=True)
    results = json.loads((tmp_path / "runs" / "tiny-toy" / "results.json").read_text())
    assert results["base"]["toy/text_to_image_recall@1"] < 0.05
    assert results["best"]["toy/text_to_image_recall@1"] >= 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_starts_from_the_loss_of_a_cpu_and_ends_a_run(tmp_path, precision):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data")
    losses = []
    for name, kind in (("cpu", "32-true"), ("gpu", precision)):
        options = [f"name={name}", f"trainer.accelerator={name}", f"trainer.precision={kind}"]
        code, path = train_here(make_config(tmp_path, *options))
        rows = read_rows(path / "metrics.csv")
        assert code == 0 and [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
        losses.append(float(rows[0]["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "32-true" else 2e-2)
