"""Killed at any point of a save: what was saved before is found, and no half file has a final name."""

import os
import random
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from jobs import append, read
from torch import nn

from clipft.learn.checkpoint import HashingFile, clean, find_state, read_state, step_path
from clipft.learn.saver import Saver

pytestmark = pytest.mark.fault
KILLS = 30


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))


def save_states(folder: Path, first: int, kill_at: int) -> None:
    """Saves one state after the other, until the kill comes; counts the calls that change the disk in a file."""
    calls = [0]

    def counted(function):
        def call(*arguments, **named):
            calls[0] += 1
            if calls[0] != kill_at:
                return function(*arguments, **named)
            if function is write:  # as much as half of it may be on disk
                file, raw = arguments
                function(file, bytes(raw)[: len(raw) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    write = HashingFile.write
    changing = [(HashingFile, "write"), (Path, "unlink"), (Path, "write_text")]
    for owner, name in [*changing, *((os, name) for name in ("replace", "link", "fsync"))]:
        setattr(owner, name, counted(getattr(owner, name)))
    weights = model().state_dict()
    for step in range(first, first + 4):
        state = {
            "state_dict": {name: torch.full_like(value, step) for name, value in weights.items()},
            "optimizer_states": [],
            "clipft": {"step": step, "best_step": step - step % 2, "ledger": {"used": step, "dropped": {}}}
            | {"best_value": 0.5, "select": "mean_recall@1", "since_best": step % 2, "trained_by": {}},
        }
        saver = Saver(2, {}, print)
        saver.save_checkpoint(state, step_path(folder, step))
        saver.finish()
        append(folder.parent / "done", f"{step} {calls[0]}")


def in_child(folder: Path, first: int, kill_at: int) -> int | None:
    process = get_context("fork").Process(target=save_states, args=(folder, first, kill_at))
    process.start()
    process.join(30)
    return process.exitcode


def test_thirty_kills_at_any_point_of_a_save_lose_no_state_that_was_done(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert in_child(folder, 1, kill_at=0) == 0
    num_calls = int(read(tmp_path / "done").split()[-1])
    assert num_calls > 40
    draw, partial = random.Random(0), 0
    for kill_at in draw.sample(range(1, num_calls + 1), KILLS):
        done = int(read(tmp_path / "done").splitlines()[-1].split()[0])
        assert in_child(folder, done + 1, kill_at) == -signal.SIGKILL
        done = int(read(tmp_path / "done").splitlines()[-1].split()[0])
        partial += any(folder.glob(".*.tmp"))
        for file in folder.glob("*.ckpt"):
            assert set(torch.cat([value.flatten() for value in read_state(file)["state_dict"].values()]).tolist()) == {
                read_state(file)["clipft"]["step"]
            }
        clean(folder)
        assert not list(folder.glob(".*"))
        found = find_state(folder, model())
        assert not found.notes and found.best and done <= found.step <= done + 1
    assert partial > KILLS // 4  # they did strike in the middle
