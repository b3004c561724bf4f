"""What strikes: signals, errors, hangs, numbers that are not finite, at the place where a fault is planted."""

import math
import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch
from jobs import Action

from clipft.data.loader import Batch
from clipft.learn.module import ContrastiveModule
from clipft.learn.stop import StopRequest


def to_itself(number: int) -> Action:
    return lambda module, batch: os.kill(os.getpid(), number)


def to_supervisor(number: int, times: int = 1) -> Action:
    """The signal to the rank's parent, and back when that has sent it on: the ranks are still at this step."""

    def send(module: Any, batch: Any) -> None:
        for _ in range(times):
            os.kill(os.getppid(), number)
            wait_for_request()

    return send


def kill_supervisor(module: Any, batch: Any) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    wait_for_request()


def wait_for_request() -> None:
    """Returns when a stop signal has come here."""
    request = stop_request()
    while not request.received:
        time.sleep(0.001)


def stop_request() -> StopRequest:
    """The object that takes this process's stop signals."""
    request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    assert isinstance(request, StopRequest)
    return request


def fail(module: Any, batch: Any) -> None:
    raise RuntimeError("a planted failure")


def run_out_of_memory(module: Any, batch: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def stall(module: Any, batch: Any) -> None:
    while True:
        time.sleep(60)


def spoil_feature(value: float) -> Action:
    """The value added to the image feature of this step's first usable sample."""

    def spoil(module: ContrastiveModule, batch: Batch) -> None:
        towers, step = module.towers, module.step
        key = batch.keys[batch.valid.tolist().index(True)]

        def spoiled(micro: Batch) -> torch.Tensor:
            added = [value if module.step == step and each == key else 0.0 for each in micro.keys]
            return towers.image.encode(micro) + torch.tensor(added)[:, None]

        module.towers = replace(towers, image=replace(towers.image, encode=spoiled))

    return spoil


def spoil_gradient(module: ContrastiveModule, batch: Batch) -> None:
    """Not a number in this step's gradient of one parameter."""
    step = module.step
    parameter = next(module.model.parameters())
    parameter.register_hook(lambda gradient: gradient * math.nan if module.step == step else gradient)
