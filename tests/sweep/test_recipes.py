"""The README's recipes for other programs that start trainings: wandb's agent and Slurm's srun."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import make_data, make_model

import clipft
from clipft.cli import main

ROOT = Path(clipft.__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_wandbs_agent_starts_the_command_of_the_recipe(tmp_path, monkeypatch, capsys):
    """The agent's own code makes it out of the recipe and of what its server would send."""
    from wandb import wandb_agent

    recipe = yaml.safe_load(next(re.finditer(r"```yaml\n(# sweep.yaml.*?)```", README, re.DOTALL))[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT", "7")
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any):
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent.__dict__.update(
        _in_jupyter=False, _sweep_command=recipe["command"], _function=None, _forward_signals=False, _run_processes={}
    )
    assert set(recipe["parameters"]) == {"optim.lr", "train.batch_size"}
    sent = {"optim.lr": {"value": 3.1234e-05}, "train.batch_size": {"value": 128}}
    agent._command_run({"run_id": "abc", "program": recipe["program"], "args": sent})
    (command,) = started
    assert command[:3] == ["/usr/bin/env", "python", "train.py"]
    assert main(["train", *command[3:], "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert all(
        line in text for line in ("lr: 3.1234e-05", "batch_size: 128", "logger: wandb", "runs_dir: runs/wandb-7")
    )
    assert recipe["metric"] == {"name": "val/best", "goal": "maximize"}


@pytest.mark.slow  # two ranks that import everything
def test_the_lines_for_slurm_start_ranks_without_torchrun(tmp_path):
    """srun as a loop: the processes that it would start, with the variables that it would set."""
    make_model(tmp_path / "model")
    make_data(tmp_path / "data")
    script = next(re.finditer(r"```bash\n(#!/bin/bash.*?)```", README, re.DOTALL))[1]
    inner = re.search(r"bash -c '(.*)'", script, re.DOTALL)
    assert inner and "python train.py" in inner[1]
    words = [
        f"model={tmp_path}/model",
        f"data.path={tmp_path}/data/packed",
        "train.batch_size=8",
        "train.max_steps=3",
        "data.workers=0",
        "eval.base=false",
        "trainer.accelerator=cpu",
        "name=slurm",
    ]
    start = re.sub(r"python train\.py.*", f"{sys.executable} {ROOT / 'train.py'} {' '.join(words)}", inner[1])
    variables = re.findall(r"^export (.*)$", script, re.MULTILINE)
    loop = "\n".join(
        [
            "hostname() { echo 127.0.0.1; }; scontrol() { echo 127.0.0.1; }",
            "export SLURM_JOB_ID=4321 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_JOB_NODELIST=here",
            *(f"export {each}" for each in variables),
            "for n in 0 1; do",
            f"  SLURM_PROCID=$n SLURM_LOCALID=$n bash -c '{start}' & pids+=($!)",
            "done",
            'for pid in "${pids[@]}"; do wait $pid || exit $?; done',
        ]
    )
    done = subprocess.run(["bash", "-c", loop], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and (tmp_path / "runs" / "slurm" / "results.json").exists()
