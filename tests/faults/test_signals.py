"""Asked to stop: all ranks save the same step and go, and the same command continues."""

import os
import signal
import time
from threading import Timer

import pytest
from checks import check
from jobs import FINAL_EVALUATION, FIRST_EVALUATION, START, VALIDATION, WRITING, Fault, go
from strikes import stop_request, to_itself, to_supervisor

from clipft.learn.checkpoint import saved_step

pytestmark = pytest.mark.fault
SPLIT = ("trainer.devices=2", "train.micro_batch=3", "checkpoint.every=100")
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
TO_ONE = {
    "SIGTERM to the command": ([Fault(0, 4, to_supervisor(TERM))], 143),
    "SIGTERM to rank 0": ([Fault(0, 4, to_itself(TERM))], 143),
    "SIGTERM to rank 1": ([Fault(1, 4, to_itself(TERM))], 143),
    "SIGTERM to all": ([Fault(1, 4, to_itself(TERM)), Fault(0, 4, to_supervisor(TERM))], 143),
    "SIGINT to the command": ([Fault(0, 4, to_supervisor(INT))], 130),
    "SIGHUP to the command": ([Fault(1, 4, to_supervisor(signal.SIGHUP))], 143),
}


@pytest.mark.parametrize("case", TO_ONE)
def test_all_ranks_save_the_step_at_which_one_was_asked_to_stop(make, calm, case):
    faults, code = TO_ONE[case]
    config = make(case.replace(" ", "-"), *SPLIT)
    ended = go(config, *faults)
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 4
    assert "Stopped at step 4 of 14" in ended.last_line
    check(ended, code, calm(*SPLIT))


def test_loader_processes_that_get_the_signal_too_still_deliver(make, calm):
    config = make("groups", *SPLIT, "data.workers=1")
    ended = go(config, Fault(0, 4, lambda module, batch: os.killpg(0, TERM)))
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 4
    check(ended, 143, calm(*SPLIT))


@pytest.mark.parametrize("number, code", [(TERM, 143), (INT, 130)])
def test_a_stop_is_heard_while_a_batch_does_not_come_and_the_last_step_is_saved(make, calm, number, code):
    def hold_workers(module, batch):
        for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
            os.kill(int(child), signal.SIGSTOP)
        Timer(3, lambda: os.kill(os.getppid(), number)).start()

    config = make(f"held-{code}", "data.workers=2", "checkpoint.every=100")
    ended = go(config, Fault(0, 4, hold_workers))
    step = saved_step(ended.path / "checkpoints" / "last.ckpt")
    assert 4 <= step < 14 and f"Stopped at step {step} of 14" in ended.last_line
    check(ended, code, calm("checkpoint.every=100"))


def test_a_second_request_while_the_state_is_written_loses_nothing(make, calm):
    def after_the_last_step(module, batch):
        while stop_request().stepping:
            time.sleep(0.001)
        os.kill(os.getpid(), TERM)

    ended = go(make("twice", *SPLIT), Fault(1, 4, to_itself(TERM)), Fault(0, WRITING, after_the_last_step))
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 4
    assert "Stopped at step 4 of 14" in ended.last_line
    check(ended, 143, calm(*SPLIT))


def test_a_second_interrupt_ends_at_once_without_a_save(make, calm):
    def twice(module, batch):
        to_supervisor(INT)(module, batch)
        os.kill(os.getppid(), INT)
        signal.pause()

    config = make("impatient", *SPLIT)
    ended = go(config, Fault(0, 4, twice))
    assert not (ended.path / "checkpoints" / "last.ckpt").exists()
    check(ended, 130, calm(*SPLIT))


@pytest.mark.parametrize(
    "variables, job",
    [
        ({"SLURM_JOB_ID": "77"}, "77"),
        ({"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "78", "SLURM_ARRAY_TASK_ID": "2"}, "78_2"),
    ],
)
def test_slurms_notice_of_the_end_saves_and_requeues_the_job(make, calm, tmp_path, variables, job):
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    ended = go(make(f"slurm-{job}", *SPLIT), Fault(0, 4, to_supervisor(USR1)), environment=environment)
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 4
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    check(ended, 143, calm(*SPLIT))


def test_the_end_of_the_time_that_a_run_may_take_is_a_stop_too(make, calm):
    ended = go(make("time", *SPLIT, "train.max_time=0.001s"))
    assert saved_step(ended.path / "checkpoints" / "last.ckpt") == 1
    assert "train.max_time" in ended.last_line
    check(ended, 143, calm(*SPLIT), again=make("time", *SPLIT))


AROUND = {
    "while it loads": START,
    "before the base is measured": FIRST_EVALUATION,
    "while it validates": VALIDATION,
    "while it measures the end": FINAL_EVALUATION,
}


@pytest.mark.parametrize("case", AROUND)
@pytest.mark.parametrize("whom", ["the command", "rank 1"])
def test_a_stop_at_any_time_ends_the_job_and_the_same_command_ends_the_run(make, calm, case, whom):
    fault = Fault(1, AROUND[case], to_itself(TERM)) if whom == "rank 1" else Fault(0, AROUND[case], to_supervisor(TERM))
    ended = go(make(f"{case}-{whom}".replace(" ", "-"), *SPLIT), fault)
    check(ended, 143, calm(*SPLIT))


def test_a_stop_while_the_last_step_is_being_measured_is_heard(make, calm):
    config = make("end", *SPLIT, "eval.every=100")
    ended = go(config, Fault(1, VALIDATION, to_itself(TERM)))
    check(ended, 143, calm(*SPLIT, "eval.every=100"))
