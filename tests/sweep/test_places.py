"""Who gets which GPUs and how many cores."""

import os

import pytest

from clipft.ranks import Ranks
from clipft.report import CORES, job_cores
from clipft.sweep.places import GPUS, places, visible_gpus

FOUR = ["0", "1", "2", "3"]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(CORES, "8")


@pytest.mark.parametrize(
    "n_jobs, devices, gpus, expected",
    [
        (None, 1, FOUR, ["0", "1", "2", "3"]),
        (None, 2, FOUR, ["0,1", "2,3"]),
        (None, 3, FOUR, ["0,1,2"]),
        (1, 2, FOUR, ["0,1"]),
        (2, 1, ["GPU-a", "GPU-b"], ["GPU-a", "GPU-b"]),
    ],
)
def test_no_gpu_belongs_to_two_trials_at_a_time(n_jobs, devices, gpus, expected):
    found = places(n_jobs, devices, "auto", gpus)
    assert [place[GPUS] for place in found] == expected


@pytest.mark.parametrize("n_jobs, devices, cores, threads", [(None, 1, 8, 8), (4, 1, 2, 2), (2, 2, 4, 2), (3, 4, 2, 1)])
def test_on_a_cpu_the_threads_of_all_processes_stay_within_the_cores(n_jobs, devices, cores, threads):
    found = places(n_jobs, devices, "cpu", FOUR)
    assert len(found) == (n_jobs or 1)
    assert all(place == {CORES: str(cores), "OMP_NUM_THREADS": str(threads)} for place in found)


def test_a_number_of_threads_that_was_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in places(2, 1, "cpu", [])[0]


@pytest.mark.parametrize(
    "n_jobs, devices, message", [(3, 2, "need 6 GPUs, and 4 are visible"), (None, 5, "more than the 4")]
)
def test_more_gpus_than_there_are_are_refused(n_jobs, devices, message):
    with pytest.raises(ValueError, match=message):
        places(n_jobs, devices, "gpu", FOUR)


def test_visible_gpus_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv(GPUS, "2, GPU-a")
    assert visible_gpus() == ["2", "GPU-a"]
    monkeypatch.setenv(GPUS, "")
    assert visible_gpus() == []


def test_a_rank_counts_on_the_cores_of_its_job(monkeypatch):
    import torch

    ranks = Ranks(torch.device("cpu"), 0, 2, 2, "32-true")
    assert ranks.cores() == 4
    monkeypatch.delenv(CORES)
    assert job_cores() == len(os.sched_getaffinity(0))
