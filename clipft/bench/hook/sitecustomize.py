"""Put on PYTHONPATH, notes the time of every optimizer step of any program that trains with torch.

CLIPFT_BENCH_CLOCK names a file that gets a line of seconds (of the monotonic clock) for each step; on a GPU the time
when the device is done with the step, without waiting for it. CLIPFT_BENCH_LOSS names one that gets the value of the
first tensor on which backward() is called. Only the standard library is imported here; torch is watched for.
"""

import atexit
import importlib.abc
import importlib.util
import os
import sys
import time

LEAST = 100_000  # values of a model; what has fewer, a trainer tries an optimizer on
CLOCK, LOSS = os.environ.get("CLIPFT_BENCH_CLOCK"), os.environ.get("CLIPFT_BENCH_LOSS")
WATCHED = "torch.optim.optimizer"  # comes with `import torch`, whose Tensor stands by then


class Watcher(importlib.abc.MetaPathFinder):
    """Lets the others find the module, and calls `place_hooks` when it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_place(module):
            load(module)
            place_hooks(module)

        spec.loader.exec_module = load_and_place
        return spec


def place_hooks(optimizer_module):
    if CLOCK:
        optimizer_module.register_optimizer_step_post_hook(note_step)
    if LOSS:
        watch_backward()


events = []


def note_step(optimizer, *_):
    """On a GPU times are asked for at the end, since asking waits."""
    import torch

    if sum(value.numel() for group in optimizer.param_groups for value in group["params"]) < LEAST:
        return
    if not torch.cuda.is_initialized():
        write(CLOCK, time.monotonic())
        return
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    if not events:
        event.synchronize()
        events.append((event, time.monotonic()))
        atexit.register(write_events)
    else:
        events.append((event, 0.0))


def write_events():
    events[-1][0].synchronize()
    first, at = events[0]
    for event, _ in events:
        write(CLOCK, at + first.elapsed_time(event) / 1000)


def watch_backward():
    import torch

    backward = torch.Tensor.backward

    def noted(tensor, *arguments, **options):
        torch.Tensor.backward = backward
        write(LOSS, float(tensor.detach()))
        return backward(tensor, *arguments, **options)

    torch.Tensor.backward = noted  # pyright: ignore[reportAttributeAccessIssue]


def write(path, value):
    with open(path, "a") as file:
        file.write(f"{value!r}\n")


if CLOCK or LOSS:
    sys.meta_path.insert(0, Watcher())
