"""The hook that is placed in both trainers from outside."""

import os
import subprocess
import sys

import pytest

from clipft.bench.contenders import HOOK, Ran, Task
from clipft.bench.training import speed

PROGRAM = """
import torch
weight, small = (torch.nn.Parameter(torch.full((size,), 3.0)) for size in (100_000, 2))
optimizer = torch.optim.SGD([weight], lr=0.5)
torch.optim.SGD([small], lr=0.5).step()  # a trial, which is no step of the training
for _ in range(3):
    optimizer.zero_grad()
    weight.mean().backward()
    optimizer.step()
"""


@pytest.mark.process
def test_it_notes_every_step_and_the_first_loss_of_any_program(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(HOOK), "CLIPFT_BENCH_CLOCK": str(tmp_path / "clock")}
    env["CLIPFT_BENCH_LOSS"] = str(tmp_path / "loss")
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, timeout=120)
    times = [float(line) for line in (tmp_path / "clock").read_text().splitlines()]
    assert len(times) == 3 and times == sorted(times)
    assert (tmp_path / "loss").read_text() == "3.0\n"


@pytest.mark.process
def test_without_its_variables_it_changes_nothing(tmp_path):
    check = "import sys; assert not any(type(each).__name__ == 'Watcher' for each in sys.meta_path)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("CLIPFT_BENCH")}
    subprocess.run([sys.executable, "-c", check], env=env | {"PYTHONPATH": str(HOOK)}, check=True, timeout=60)


def test_speed_is_taken_after_the_warm_up_and_needs_every_step(tmp_path):
    task = Task(tmp_path, [], 40, batch_size=8, steps=5, workers=1, device="cpu", precision="fp32")
    assert speed(Ran([9.0, 10.0, 11.0, 13.0, 14.0], 2.0), task, warm_up=2) == 8 * 3 / 4
    with pytest.raises(RuntimeError, match="4 optimizer steps were seen, 5 were asked for"):
        speed(Ran([1.0, 2.0, 3.0, 4.0], 2.0), task, warm_up=2)
