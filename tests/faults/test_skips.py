"""Gradients that are not finite on one rank: all ranks leave that step out together, and say which sample it was."""

import hashlib
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from checks import check, whole_rows
from jobs import Fault, go
from strikes import spoil_feature, spoil_gradient, to_itself

from clipft.learn.checkpoint import read_state

pytestmark = pytest.mark.fault
SPLIT = ("trainer.devices=2",)
SPOILERS = {
    "nan": (1, spoil_feature(math.nan)),
    "inf": (0, spoil_feature(math.inf)),
    "gradient": (1, spoil_gradient),
}


def leave_weights(folder: Path, name: str):
    """Writes the hash of the weights, once they are known to be finite."""

    def leave(module, batch) -> None:
        values = torch.cat([value.detach().flatten() for value in module.model.state_dict().values()])
        assert values.isfinite().all()
        (folder / name).write_text(hashlib.sha256(values.numpy().tobytes()).hexdigest())

    return leave


def guilty(path: Path, step: int, number: int) -> str:
    """The sample that was spoiled: the first usable one."""
    notes = path.parent / "notes" / path.name / "000" / "keys"
    rows = [json.loads(line) for line in notes.read_text().splitlines()]
    (row,) = [row for row in rows if (row["step"], row["rank"]) == (step, number)]
    return row["keys"][row["valid"].index(True)]


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("kind", SPOILERS)
def test_all_ranks_leave_the_step_out_and_go_on_alike(make, tmp_path, kind, micro_batch):
    number, spoil = SPOILERS[kind]
    leave = [Fault(r, step, leave_weights(tmp_path, f"{step}-{r}")) for r in (0, 1) for step in (5, 6, 14)]
    config = make(f"skips-{kind}-{micro_batch}", *SPLIT, f"train.micro_batch={micro_batch}")
    ended = go(config, Fault(number, 5, spoil), *leave)
    check(ended, 0, None)
    weights = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert weights["5-0"] == weights["5-1"] == weights["6-0"] == weights["6-1"]
    assert weights["14-0"] == weights["14-1"] != weights["6-0"]
    rows = whole_rows(ended.path / "metrics.csv")
    assert [row["step"] for row in rows if float(row["train/skipped"])] == ["5"]
    (line,) = [line for line in ended.stderr.splitlines() if "step 5 is left out" in line]
    assert line in (ended.path / "log.txt").read_text()
    assert "backward" in line if kind == "gradient" else guilty(ended.path, 5, number) in line


def test_all_ranks_leave_the_step_out_where_the_host_decides_and_the_average_stays_too(make, tmp_path):
    """Lamb does not skip by itself; killed after such a step, the run ends as without the kill."""
    options = (*SPLIT, "optim.name=lamb", "optim.lr=1e-3", "train.ema=0.5", "checkpoint.every=1")
    leave = [Fault(r, step, leave_weights(tmp_path, f"{step}-{r}")) for r in (0, 1) for step in (5, 6, 14)]
    ended = go(make("skips-lamb", *options), Fault(1, 5, spoil_gradient), *leave)
    check(ended, 0, None)
    weights = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert weights["5-0"] == weights["5-1"] == weights["6-0"] == weights["6-1"]
    assert weights["14-0"] == weights["14-1"] != weights["6-0"]
    killed = go(
        make("skips-lamb-killed", *options), Fault(1, 5, spoil_gradient), Fault(0, 8, to_itself(signal.SIGKILL))
    )
    check(killed, 137, ended.path)


def test_too_many_in_a_row_stop_the_run_with_advice_and_the_last_good_weights(make):
    config = make("skips-stop", *SPLIT, "train.micro_batch=4", "train.max_skipped=3")
    ended = go(config, *(Fault(1, step, spoil_feature(math.nan)) for step in (3, 5, 6, 7)))
    check(ended, 1, None)
    assert "3 steps in a row, up to step 7" in ended.last_line
    assert "train.max_skipped=3" in ended.last_line and "optim.lr" in ended.last_line
    for file in (ended.path / "checkpoints").glob("*.ckpt"):
        assert all(value.isfinite().all() for value in read_state(file)["state_dict"].values())
    check(go(config), 0, None)
