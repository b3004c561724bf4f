"""Damaged states: named in one sentence, and the one before is used."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import check
from jobs import Fault, go
from strikes import to_itself

from clipft.learn.checkpoint import read_state

pytestmark = pytest.mark.fault


def cut(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with file.open("r+b") as raw:
            raw.truncate(int(share * file.stat().st_size) if share < 1 else file.stat().st_size - 1)

    return damage


def flip(file: Path) -> None:
    """One bit, in the middle of the tensors."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    with file.open("r+b") as same:
        same.write(raw)


def html(file: Path) -> None:
    file.write_text("<!DOCTYPE html><title>404</title>")


def of_another_model(file: Path) -> None:
    state = read_state(file)
    state["state_dict"]["visual.conv1.weight"] = torch.zeros(3, 3)
    torch.save(state, file)


DAMAGES = {
    "one byte short": cut(1),
    "half": cut(0.5),
    "a hundredth": cut(0.01),
    "empty": cut(0),
    "one bit": flip,
    "html": html,
    "another model": of_another_model,
}


@pytest.fixture(scope="module")
def stopped(make) -> Path:
    """A run that was stopped at step 8, with states of steps 6 and 8."""
    ended = go(make("stopped"), Fault(0, 8, to_itself(signal.SIGTERM)))
    check(ended, 143, None)
    return ended.path


def copy_of(stopped: Path, name: str) -> Path:
    """The run under another name, with states that are one file under two names as before."""
    path = stopped.parent / name.replace(" ", "-")
    subprocess.run(["cp", "-a", stopped, path], check=True)
    return path / "checkpoints"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(make, calm, stopped, kind):
    folder = copy_of(stopped, kind)
    DAMAGES[kind](folder / "step-00000008.ckpt")
    ended = go(make(kind.replace(" ", "-")))
    (line,) = [line for line in ended.stdout.splitlines() if "step-00000008.ckpt " in line]
    assert "It is now called step-00000008.ckpt.damaged." in line
    assert "Going on from step-00000006.ckpt, step 6." in ended.stdout
    check(ended, 0, calm())


def test_a_damaged_last_is_replaced_by_the_same_step_under_its_other_name(make, calm, stopped):
    last = copy_of(stopped, "last") / "last.ckpt"
    last.unlink()
    html(last)
    ended = go(make("last"))
    assert "step 8 of 14" in ended.stdout
    check(ended, 0, calm())


def test_a_run_with_nothing_but_damaged_states_does_not_begin_again_unasked(make, calm, stopped):
    folder = copy_of(stopped, "all")
    for file in folder.glob("*.ckpt"):
        if file.stat().st_size:
            cut(0)(file)
    ended = go(make("all"))
    assert ended.code == 2 and not ended.left
    assert "has no state to go on from" in ended.last_line and "resume=restart" in ended.last_line
    check(go(make("all", "resume=restart")), 0, calm())


def test_a_damaged_best_is_put_aside_and_chosen_again(make, calm, stopped):
    best = copy_of(stopped, "best") / "best.ckpt"
    best.unlink()
    html(best)
    ended = go(make("best"))
    assert "best.ckpt" in ended.stdout and "step 8 of 14" in ended.stdout
    check(ended, 0, calm())
