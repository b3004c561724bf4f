"""Batches that are waited for: loader processes that die, or hang, are named with the sample that they read."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from clipft.report import RunFailed

PREFETCH = 2  # steps that a worker prepares ahead
WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\) (?:is )?([^.]*)")  # torch's words for it
NOTHING = -1  # in the place of the number of a sample
LOOK_S = 1  # between two looks at the workers, and at whether the run is to stop
FIRST_WORD_S = 60  # without any progress; then after twice as long each time
STOP_S = 20  # that a run which is to stop, and cannot without its batch, waits for it
KILLED_S = 5
STATES = {"T": "stopped, ", "D": "waiting for a disk, "}  # of processes, as Linux has them


@dataclass(frozen=True)
class Wait:
    """How long a batch is waited for while no loader process gets any further."""

    limit_s: float = 540.0
    asked_to_stop: Callable[[], str] = lambda: ""
    """Why the run is to stop, or nothing."""
    leave: Callable[[], None] | None = None
    """Ends a run that is to stop before a batch that is waited for, where it can be ended there."""


class Leave(Exception):
    """The run is to end, and no more batches are wanted."""


class InFlight:
    """Which item each loader process reads, in memory shared with its parent, where it outlives the process."""

    def __init__(self, workers: int):
        self.slots = torch.full((workers, 2), NOTHING).share_memory_()  # pid, item
        self.since = torch.zeros(workers, dtype=torch.float64).share_memory_()  # on the clock that all processes share

    def note(self, item: int) -> None:
        """Writes down what this process reads from now on; the training process notes nothing."""
        info = get_worker_info()
        if info is not None:
            self.slots[info.id] = torch.tensor([os.getpid(), item])
            self.since[info.id] = time.monotonic()

    def beat(self) -> None:
        """Says that this process gets further with what it reads, such as a shard that is downloaded."""
        info = get_worker_info()
        if info is not None:
            self.since[info.id] = time.monotonic()

    def of(self, pids: set[int]) -> list[int]:
        """What these processes were reading, as far as they are known here."""
        return [item for pid, item in self.slots.tolist() if pid in pids]

    def last(self) -> float:
        """When any of them began with an item, or ended its last one."""
        return float(self.since.max())


class WaitingLoader(DataLoader):
    """A loader that does not wait for ever, and says what for."""

    def __init__(self, dataset: Dataset, in_flight: InFlight, key: Callable[[int], str], wait: Wait, **options):
        super().__init__(dataset, **options)
        self.in_flight, self.key, self.wait = in_flight, key, wait

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = super().__iter__()
        return Waiting(self, batches) if self.num_workers and current_thread() is main_thread() else batches


class Waiting(Iterator[Any]):
    """The batches of a loader with processes, each waited for as long as there is hope."""

    def __init__(self, loader: WaitingLoader, batches: Iterator[Any]):
        self.loader, self.wait, self.batches = loader, loader.wait, batches
        self.waits, self.began, self.next_word_s = False, 0.0, 0.0

    def __next__(self) -> Any:
        """By a timer's signal, as it reaches the thread wherever it waits; torch's own timeout is not heard while a
        batch comes from a process that stands still."""
        self.waits, self.began = True, time.monotonic()
        self.next_word_s = min(FIRST_WORD_S, self.wait.limit_s / 2)
        before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
        try:
            batch = next(self.batches)
            self.waits = False
            return batch
        except RunFailed:
            kill_workers(self.loader.in_flight)
            raise
        except Leave:
            kill_workers(self.loader.in_flight)
            assert self.wait.leave is not None
            self.wait.leave()
            raise StopIteration from None
        finally:
            self.waits = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _look(self, _number: int, _frame: FrameType | None) -> None:
        """Ends the wait when it is hopeless or not wanted any more; says when it is long."""
        if not self.waits:
            return
        reason = self.wait.asked_to_stop()
        if reason and self.wait.leave:
            raise Leave
        silent_s = time.monotonic() - max(self.began, self.loader.in_flight.last())
        if silent_s >= self.wait.limit_s or (reason and silent_s >= STOP_S):
            asked = f"{reason} asked the run to stop, and " if reason else ""
            raise RunFailed(
                f"{asked}{self._said(silent_s)}. See whether the disk of the shards answers, or who stopped the "
                "process. How long such a wait may be follows from trainer.dist_timeout_s. The same command goes on "
                "from the last saved state."
            )
        if silent_s >= self.next_word_s:
            self.next_word_s *= 2
            start = "\r\x1b[K" if sys.stderr.isatty() else ""  # over a line of progress that is drawn there
            print(f"{start}warning: {self._said(silent_s)}", file=sys.stderr, flush=True)

    def _said(self, silent_s: float) -> str:
        """Which process reads what since when, or stands still."""
        in_flight, now, found = self.loader.in_flight, time.monotonic(), []
        for (pid, item), since in zip(in_flight.slots.tolist(), in_flight.since.tolist(), strict=True):
            state = STATES.get(state_of(pid), "")
            where = f"at {self.loader.key(item)} for {now - since:.0f} s" if item != NOTHING else "between samples"
            if item != NOTHING or state:
                found.append(f"process {pid} is {state}{where}")
        which = ", ".join(found) or "none of them is at a sample"
        return f"no batch came and no loader process got any further for {silent_s:.0f} s: {which}"


def kill_workers(in_flight: InFlight) -> None:
    """Ends a loader's processes: one that stands still hears nothing else, and would be waited for at the end."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises over each
    pids = set(in_flight.slots[:, 0].tolist())
    children = [child for child in active_children() if child.pid in pids]
    for child in children:
        child.kill()
    for child in children:
        child.join(KILLED_S)
    signal.signal(signal.SIGCHLD, before)


def state_of(pid: int) -> str:
    """The letter that Linux has for what the process does; nothing where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextmanager
def naming_lost_workers(loader: WaitingLoader) -> Iterator[None]:
    """Inside it, torch's error over a process of this loader that died becomes a RunFailed with the sample it read."""
    try:
        yield
    except RuntimeError as error:
        said = lost_worker(loader, error)
        if said is None:
            raise
        if current_thread() is main_thread():  # where torch could raise over the dead one again, at any later time
            kill_workers(loader.in_flight)
        raise RunFailed(said) from error


def lost_worker(loader: WaitingLoader, error: RuntimeError) -> str | None:
    """What to tell the user when the error means that a process of this loader died; None for other errors."""
    match = WORKER_DIED.search(str(error))
    lost = loader.in_flight.of({int(pid) for pid in match[1].split(",")}) if match else []
    if match is None or not lost:
        return None
    keys = [loader.key(item) for item in lost if item != NOTHING]
    # The cause names the signal where torch was told of it; without, it looks every 5 seconds.
    how = (WORKER_DIED.search(str(error.__cause__)) or match)[2].strip()
    return (
        f"a loader process died ({how}) while it read {', '.join(keys) or 'no sample'}. If it was killed, "
        "memory may have run out: lower data.workers. If it crashed, look at that sample. The same command goes on "
        "from the last saved state."
    )


def in_order(
    dataset: Dataset,
    steps: Sampler[int],
    in_flight: InFlight,
    key: Callable[[int], str],
    wait: Wait,
    workers: int,
    pin: bool,
) -> WaitingLoader:
    """The items of these steps, each built whole by one process, in the order of the steps."""
    return WaitingLoader(
        dataset,
        in_flight,
        key,
        wait,
        sampler=steps,
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=partial(start_worker, in_flight) if workers else None,
        # By fork the workers share the index's memory and start in milliseconds.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def as_it_is(item: Any) -> Any:
    return item


def start_worker(in_flight: InFlight, _: int) -> None:
    """Lets a worker go on when a stop signal goes to all processes: the last step still needs its batches.

    Only SIGTERM from the training process itself ends it; that is how multiprocessing cleans up.
    """
    in_flight.note(NOTHING)  # so that its parent knows it from the start
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=exit_when_parent_asks, daemon=True).start()


def exit_when_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
