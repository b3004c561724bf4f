"""Killed at any step: the same command goes on, also on other devices, and ends where an undisturbed run ends."""

import os
import signal

import numpy as np
import pytest
from checks import check, keys_of
from jobs import WRITING, Fault, go
from strikes import kill_supervisor, to_itself

from clipft.learn.checkpoint import saved_step

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("devices, workers", [(1, 0), (1, 2), (2, 0)])
def test_three_kills_in_one_epoch_cost_nothing(make, calm, devices, workers):
    split = (f"trainer.devices={devices}", "train.micro_batch=3")
    config = make(f"killed-{devices}-{workers}", *split, f"data.workers={workers}")
    steps = sorted(np.random.default_rng(devices + workers).choice(np.arange(1, 13), 3, replace=False).tolist())
    like = calm(*split)
    for number, step in enumerate(steps):
        ended = go(config, Fault(number % devices, step, to_itself(signal.SIGKILL)))
        check(ended, 128 + signal.SIGKILL, like if step == steps[-1] else None)
    assert keys_of(like.with_name(str(config.name))) == keys_of(like)
    assert sorted(keys_of(like)) == list(range(1, 15))


def test_one_two_and_one_devices_see_the_batches_of_one_and_train_its_model(make, calm):
    one, two = (make("elastic", f"trainer.devices={devices}", "data.workers=0") for devices in (1, 2))
    like = calm("trainer.devices=1", "train.micro_batch=3")
    check(go(one, Fault(0, 5, to_itself(signal.SIGKILL))), 137, None)
    ended = go(two, Fault(1, 9, to_itself(signal.SIGKILL)))
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") >= 6
    check(ended, 137, like, again=one, exact=False)
    assert keys_of(ended.path) == keys_of(like)


def test_other_loader_workers_after_a_kill_change_nothing(make, calm):
    none, three = (make("workers", "train.micro_batch=3", f"data.workers={workers}") for workers in (0, 3))
    ended = go(none, Fault(0, 7, to_itself(signal.SIGKILL)))
    check(ended, 137, calm("trainer.devices=1", "train.micro_batch=3"), again=three)


def test_a_run_whose_processes_all_die_at_once_goes_on(make, calm):
    """Supervisor and ranks, as when a machine goes down."""
    split = ("trainer.devices=2", "train.micro_batch=3")

    def kill_all(module, batch):
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    config = make("power", *split)
    ended = go(config, Fault(0, 9, kill_all), Fault(1, 9, to_itself(signal.SIGKILL)))
    check(ended, -signal.SIGKILL, calm(*split))


def test_ranks_whose_supervisor_is_killed_save_and_go(make, calm):
    split = ("trainer.devices=2", "train.micro_batch=3")
    config = make("orphans", *split, "checkpoint.every=100")
    ended = go(config, Fault(0, 5, kill_supervisor))
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 5
    check(ended, -signal.SIGKILL, calm(*split, "checkpoint.every=100"))


def test_a_kill_while_a_state_is_being_written_costs_that_state_only(make, calm):
    config = make("writing", "train.micro_batch=3")
    ended = go(config, Fault(0, WRITING, to_itself(signal.SIGKILL)))
    check(ended, 137, calm("trainer.devices=1", "train.micro_batch=3"))
