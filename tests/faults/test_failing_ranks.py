"""A rank that fails, hangs, runs out of memory or differs: the job ends everywhere, and says why last."""

import json
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from checks import check
from jobs import GONE_S, START, Fault, go
from strikes import fail, run_out_of_memory, stall, to_itself

from clipft import run
from clipft.data import loader
from clipft.data.loader import TrainSteps
from clipft.launch import GRACE_S, STACK_S

pytestmark = pytest.mark.fault
SPLIT = ("trainer.devices=2", "train.micro_batch=3")


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_raises_ends_the_job_with_its_error_last(make, calm, number):
    ended = go(make(f"raises-{number}", *SPLIT), Fault(number, 6, fail))
    assert ended.last_line == "RuntimeError: a planted failure" and f"rank {number} of 2: Traceback" in ended.stderr
    assert "a planted failure" in (ended.path / "log.txt").read_text()
    check(ended, 1, calm(*SPLIT))


@pytest.mark.parametrize("number, workers", [(0, 0), (1, 1)])
def test_a_rank_that_is_killed_ends_the_job_and_is_named(make, calm, number, workers):
    config = make(f"dies-{number}", *SPLIT, f"data.workers={workers}")
    ended = go(config, Fault(number, 6, to_itself(signal.SIGKILL)))
    assert ended.last_line.startswith(f"error: rank {number} of 2 was ended by SIGKILL after step 5")
    check(ended, 137, calm(*SPLIT))


@pytest.mark.parametrize("number, how", [(0, stall), (1, stall), (1, to_itself(signal.SIGSTOP))])
def test_a_rank_that_hangs_ends_the_job_after_the_timeout_and_is_named(make, calm, number, how):
    config = make(f"hangs-{number}-{how.__name__}", *SPLIT, "trainer.dist_timeout_s=3")
    ended = go(config, Fault(number, 6, how))
    assert f"rank {number} after step 5 did not answer" in ended.last_line
    assert how is not stall or "in stall" in ended.stderr  # where it hangs
    check(ended, 1, calm(*SPLIT), gone_s=3 + GRACE_S + STACK_S + GONE_S)


def break_loader(module, batch) -> None:
    """Later items fail to load in the process that has them."""

    def broken(self, step):
        raise RuntimeError(f"no item {step}")

    TrainSteps.__getitem__ = broken


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_fails_ends_the_job_with_its_error_last(make, calm, workers):
    ended = go(make(f"loader-{workers}", *SPLIT, f"data.workers={workers}"), Fault(1, START, break_loader))
    assert "RuntimeError: no item 0" in ended.last_line
    check(ended, 1, calm(*SPLIT))


def crash_decoder(module, batch) -> None:
    """The fourth picture that a loader process decodes ends it."""
    decode, num_decoded = loader.decode_rgb, []

    def crashing(raw, max_pixels):
        num_decoded.append(0)
        if len(num_decoded) == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(raw, max_pixels)

    loader.decode_rgb = crashing


@pytest.mark.parametrize("base", ["true", "false"])  # in the first measurement, and in training
def test_a_loader_process_that_crashes_ends_the_job_with_the_sample_that_it_read(make, calm, base):
    options = [*SPLIT, f"eval.base={base}"]
    ended = go(make(f"crash-{base}", *options, "data.workers=2"), Fault(1, START, crash_decoder))
    assert re.search(r"a loader process died \(.*\) while it read \w+-\d+/\d+", ended.last_line)
    check(ended, 1, calm(*options))


def kill_workers(module, batch) -> None:
    for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
        os.kill(int(child), signal.SIGKILL)


def test_loader_processes_that_are_killed_end_the_job_and_are_named(make, calm):
    ended = go(make("workers-killed", *SPLIT, "data.workers=2"), Fault(1, 4, kill_workers))
    assert "rank 1 of 2: error: a loader process died (" in ended.last_line
    check(ended, 1, calm(*SPLIT))


@pytest.mark.parametrize("devices, timeout_s", [(1, 3), (2, 10)])
@pytest.mark.parametrize("base", ["true", "false"])  # in the first measurement, and in training
def test_a_loader_process_that_hangs_ends_the_job_with_its_sample(make, calm, devices, timeout_s, base):
    options = [f"trainer.devices={devices}", f"eval.base={base}"]
    config = make(f"hangs-{devices}-{base}", *options, "data.workers=2", f"trainer.dist_timeout_s={timeout_s}")
    ended = go(config, Fault(devices - 1, START, stall_decoder))
    assert re.search(r"no batch came .* process \d+ is (stopped, )?at \w+-\d+/\d+", ended.last_line)
    check(ended, 1, calm(*options), gone_s=timeout_s + GRACE_S + GONE_S)


def stall_decoder(module, batch) -> None:
    """The fourth picture that a loader process decodes stops it."""
    decode, num_decoded = loader.decode_rgb, []

    def stalling(raw, max_pixels):
        num_decoded.append(0)
        if len(num_decoded) == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return decode(raw, max_pixels)

    loader.decode_rgb = stalling


@pytest.mark.parametrize("devices, share", [(1, 8), (2, 4)])
def test_memory_that_runs_out_halves_the_micro_batch_of_the_next_start(make, calm, devices, share):
    config = make(f"memory-{devices}", f"trainer.devices={devices}")
    ended = go(config, Fault(devices - 1, 6, run_out_of_memory))
    for word in (f"rank {devices - 1} ran out of memory with {share} pairs", "bf16-mixed", "trainer.devices"):
        assert word in ended.last_line
    assert json.loads((ended.path / "micro_batch.json").read_text())["micro_batch"] == share // 2
    resumed = check(ended, 1, calm(f"trainer.devices={devices}"), exact=False)
    assert f"{share // 2} at a time" in resumed.stdout


def test_memory_that_runs_out_under_a_given_micro_batch_names_a_smaller_one(make, calm):
    config = make("memory-given", *SPLIT)
    ended = go(config, Fault(0, 6, run_out_of_memory))
    assert "Use train.micro_batch=1" in ended.last_line
    check(ended, 1, calm(*SPLIT), again=make("memory-given", *SPLIT[:1], "train.micro_batch=1"), exact=False)


def other_rate(config, meta, model):
    return replace(config, optim=replace(config.optim, lr=0.5)), meta, model


def other_data(config, meta, model):
    return config, meta | {"fingerprint": meta["fingerprint"] | {"train": "another"}}, model


def other_code(config, meta, model):
    return config, meta | {"code_sha256": "another"}, model


def other_weights(config, meta, model):
    with torch.no_grad():
        model.logit_scale.add_(1e-6)
    return config, meta, model


DIFFERENCES = {
    "optim.lr": other_rate,
    "the fingerprint of the train data": other_data,
    "clipft's code": other_code,
    "the checksum of the first weights": other_weights,
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_ranks_that_differ_do_not_start_and_the_difference_is_named(make, calm, key):
    def differ(module, batch) -> None:
        facts = run.facts
        run.facts = lambda config, meta, model: facts(*DIFFERENCES[key](config, meta, model))

    ended = go(make(f"differs-{list(DIFFERENCES).index(key)}", *SPLIT), Fault(1, START, differ))
    assert ended.last_line.startswith(f"error: {key} is ") and "on rank 1" in ended.last_line
    check(ended, 2, calm(*SPLIT))
