"""Where trials run side by side: GPUs and processor cores, dealt out by environment variables."""

import os
import subprocess

from clipft.report import CORES, job_cores

GPUS = "CUDA_VISIBLE_DEVICES"


def places(n_jobs: int | None, devices: int, accelerator: str, gpus: list[str]) -> list[dict[str, str]]:
    """For each of the trials that run at the same time the variables that give it its part of the machine.

    A trial takes `devices` of the `gpus`, which no other one uses meanwhile.
    """
    gpus = gpus if accelerator in ("auto", "gpu") else []
    fit = len(gpus) // devices
    if gpus and fit == 0:
        raise ValueError(f"trainer.devices={devices} are more than the {len(gpus)} GPUs that are visible.")
    if gpus and n_jobs and n_jobs > fit:
        raise ValueError(
            f"hydra.sweeper.n_jobs={n_jobs} trials of trainer.devices={devices} need {n_jobs * devices} GPUs, and "
            f"{len(gpus)} are visible. Use at most n_jobs={fit}."
        )
    count = n_jobs or fit or 1
    cores = max(1, job_cores() // count)
    shares = []
    for number in range(count):
        share = {CORES: str(cores)}
        if "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, cores // devices))
        if gpus:
            share[GPUS] = ",".join(gpus[number * devices : (number + 1) * devices])
        shares.append(share)
    return shares


def visible_gpus() -> list[str]:
    """The CUDA devices that a process started from here sees, by the names that CUDA_VISIBLE_DEVICES takes."""
    if GPUS in os.environ:
        return [name.strip() for name in os.environ[GPUS].split(",") if name.strip() not in ("", "-1")]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
