"""A disk that is full or read-only, and two runs in one folder: said early, and no good state is lost."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from checks import check
from jobs import FINAL_EVALUATION, WRITING, Action, Fault, go, start

from clipft.config import Config
from clipft.learn.checkpoint import saved_step
from clipft.plan import resolve
from clipft.rundir import settle

pytestmark = pytest.mark.fault
STATES = 6  # that the disk has room for; a run with checkpoint.keep=2 holds 4 at most


@pytest.fixture
def disk(tmp_path: Path, calm) -> Iterator[Path]:
    """A file system of its own, a little larger than a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = STATES * (calm() / "checkpoints" / "last.ckpt").stat().st_size + 1_000_000
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount needs root: {done.stderr}")


def on(disk: Path, config: Config) -> Config:
    return replace(config, runs_dir=str(disk))


def fill(disk: Path, leave: int = 0) -> Action:
    """Takes all room but `leave` bytes."""

    def take(module, batch) -> None:
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > leave:
                file.write(bytes(4096))

    return take


def when_saved(do: Action) -> Action:
    """Does it when nothing is being written: an old state that is removed meanwhile makes room."""

    def wait(module, batch) -> None:
        module.trainer.strategy.checkpoint_io.wait()
        do(module, batch)

    return wait


def empty(disk: Path) -> Action:
    return lambda module, batch: (disk / "filler").unlink()


def test_a_disk_without_room_for_a_state_is_refused_at_the_start(make, calm, disk):
    config = on(disk, make("full"))
    settle(resolve(config))
    fill(disk, leave=1_000_000)(None, None)
    ended = go(config)
    assert "runs_dir" in ended.last_line and "Make room" in ended.last_line
    (disk / "filler").unlink()
    check(ended, 2, calm())


def test_a_disk_that_fills_up_stops_the_run_after_three_saves_and_room_lets_it_go_on(make, calm, disk):
    ended = go(on(disk, make("fills")), Fault(0, 5, when_saved(fill(disk))))
    for step in (6, 8, 10):
        assert f"The state of step {step} was not saved" in ended.stderr
    assert "the newest whole state is step 4" in ended.last_line
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 4
    (disk / "filler").unlink()
    check(ended, 1, calm())


def test_a_last_state_that_cannot_be_saved_fails_the_run(make, calm, disk):
    ended = go(on(disk, make("late")), Fault(0, 13, when_saved(fill(disk))))
    assert "The state of step 14 was not saved" in ended.last_line
    (disk / "filler").unlink()
    check(ended, 1, calm())


def test_a_disk_that_is_full_for_a_while_costs_states_and_no_row(make, calm, disk):
    ended = go(on(disk, make("while")), Fault(0, 5, when_saved(fill(disk))), Fault(0, 9, empty(disk)))
    assert "rows wait in memory" in ended.stderr and "The state of step 8 was not saved" in ended.stderr
    check(ended, 0, calm())


def test_a_disk_that_fills_up_in_the_middle_of_a_save_keeps_the_states_before(make, calm, disk):
    ended = go(
        on(disk, make("middle")),
        Fault(0, WRITING, fill(disk, leave=2_000_000)),
        Fault(0, 5, empty(disk)),
    )
    assert f"[Errno {errno.ENOSPC}]" in ended.stderr and "The state of step 2 was not saved" in ended.stderr
    check(ended, 0, calm())


def test_results_that_cannot_be_written_fail_the_run_and_are_made_again(make, calm, disk):
    ended = go(on(disk, make("results")), Fault(0, FINAL_EVALUATION, fill(disk)))
    assert "No space left" in ended.last_line and "results.json" in ended.last_line
    (disk / "filler").unlink()
    check(ended, 2, calm())


def test_a_read_only_folder_is_refused_before_anything_starts(make, calm, disk):
    config = on(disk, make("read-only"))
    settle(resolve(config))
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(OSError, match="Read-only file system"):  # the command ends with 2 by it
        settle(resolve(config))
    mount("-o", "remount,rw", str(disk))
    check(go(config), 0, calm())


def test_checkpoints_that_turn_read_only_stop_the_run_with_the_last_good_state(make, calm, disk):
    config = make("turns")
    folder = settle(resolve(config)).path / "checkpoints"
    mount("--bind", str(disk), str(folder))

    def remount(module, batch) -> None:
        module.trainer.strategy.checkpoint_io.wait()  # a file that is being written keeps the disk as it is
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    try:
        ended = go(config, Fault(0, 5, remount))
        assert "Read-only file system" in ended.last_line and "the newest whole state is step 4" in ended.last_line
        mount("-o", "remount,rw", str(disk))
        check(ended, 1, calm())
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(make, calm, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    config = make("shared")
    first = start(config, Fault(0, 5, lambda module, batch: gate.read_bytes()))
    handle = opened(gate)  # the first one is at its step 5
    for resume in ("auto", "force", "restart"):
        with pytest.raises(ValueError, match=f"{first.path} is being trained by another process"):
            settle(resolve(replace(config, resume=resume)))  # the command ends with 2 by it
    os.close(handle)
    check(first.wait(), 0, calm())


def opened(gate: Path) -> int:
    """The gate's end for writing, once there is a reader."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
