"""One process per rank, watched: signals go to all, the first failure ends all, its cause is the last thing said."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from clipft.learn.stop import STOPPED
from clipft.report import PIPE

GRACE_S = 8.0  # for the other ranks once one has failed
SAVE_S = 120.0  # for the other ranks once one has stopped as it was asked to: the first one may still be saving
STACK_S = 1.0  # for a rank that hangs to show where
POLL_S = 0.05


@dataclass(frozen=True)
class Validation:
    """A value of the metric that chooses best.ckpt, made after `step` of `of` steps."""

    step: int
    of: int
    value: float


@dataclass
class Watched:
    """A rank's process and what it has told."""

    process: subprocess.Popen[bytes]
    reports: int
    """The end of its pipe that is read."""
    said: dict[str, Any] = field(default_factory=dict)
    """The last value of each word: step, stopped, error, ..."""
    validations: list[Validation] = field(default_factory=list)
    rest: bytes = b""

    def listen(self) -> None:
        with suppress(BlockingIOError):
            while raw := os.read(self.reports, 1 << 16):
                *lines, self.rest = (self.rest + raw).split(b"\n")
                for line in lines:
                    words = json.loads(line)
                    self.said |= words
                    if "validation" in words:
                        self.validations.append(Validation(**words["validation"]))

    @property
    def code(self) -> int | None:
        """The exit code as shells give it; None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


def is_rank() -> bool:
    """Whether torchrun started this process, as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class Job:
    """The ranks of one run, from their start to the end of the last."""

    def __init__(self, ranks: Iterable[Watched] = ()):
        self.ranks = list(ranks)
        self.asked: list[int] = []  # signals that were sent on: ranks that end by them have not failed
        self.cause = ""
        self.ended: list[int] = []  # in order of time
        self.deadline: float | None = None

    def start(
        self,
        command: str,
        config_file: Path,
        devices: int,
        environment: dict[str, str] | None = None,
        output: int | None = None,
    ) -> None:
        """Starts `clipft.rank` for every device, with more variables, and with what it prints in an open file."""
        port = free_port()
        for rank in range(devices):
            self.ranks.append(start_rank(command, config_file, rank, devices, port, environment or {}, output))
        for number in self.asked:  # while they were started
            forward_to(self.ranks, number)

    def ask(self, number: int) -> None:
        """Sends a stop signal on to the ranks; a second Ctrl-C kills them."""
        if number == signal.SIGINT in self.asked:  # ranks in foreign code do not hear it
            send_all(self.ranks, signal.SIGKILL)
        self.asked.append(number)
        forward_to(self.ranks, number)

    def poll(self) -> int | None:
        """The exit code for the shell once all ranks are gone, None before; `cause` then says why, if it is not 0.

        The first rank that fails gives the others a grace.
        """
        for number, rank in enumerate(self.ranks):
            code = rank.code
            rank.listen()
            if number in self.ended or code is None:
                continue
            self.ended.append(number)
            if code and self.deadline is None:
                self.deadline = time.monotonic() + (SAVE_S if "stopped" in rank.said else GRACE_S)
                if code in STOPPED:
                    send_all(self.ranks, signal.SIGTERM)
        late = self.deadline is not None and time.monotonic() >= self.deadline
        if len(self.ended) < len(self.ranks) and not late:
            return None
        code, self.cause = what_happened(self.ranks, self.ended, self.asked)
        if self.deadline is not None:
            end_all(self.ranks)
        return code

    def close(self) -> None:
        """Ends whatever is left."""
        end_all(self.ranks)
        for rank in self.ranks:
            os.close(rank.reports)


@contextmanager
def heeding(ask: Callable[[int], None]) -> Iterator[None]:
    """Hands every stop signal of this process to `ask` in place of what it did before."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)

    def handle(number: int, _frame: FrameType | None) -> None:
        ask(number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(command: str, config_file: Path, devices: int) -> int:
    """Runs `clipft.rank` on every device of this machine; returns the exit code for the shell."""
    job = Job()
    with heeding(job.ask):
        try:
            job.start(command, config_file, devices)
            return supervise(job)
        finally:
            job.close()


def supervise(job: Job) -> int:
    """Waits for all ranks; the cause of a failure is printed and its code returned."""
    while (code := job.poll()) is None:
        time.sleep(POLL_S)
    if job.cause:
        with suppress(OSError):  # a terminal that was closed
            print(job.cause, file=sys.stderr, flush=True)
    return code


def rank_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch.distributed wants to know of a rank of this machine, as environment variables."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def start_rank(
    command: str,
    config_file: Path,
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    output: int | None,
) -> Watched:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    variables = {**os.environ, **environment, **rank_variables(rank, world, port), PIPE: str(writing)}
    # A session of its own: Ctrl-C reaches the ranks once, through us. The pipe closes when we are gone.
    process = subprocess.Popen(
        [sys.executable, "-m", "clipft.rank", command, str(config_file)],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(writing)
    return Watched(process, reading)


def what_happened(ranks: list[Watched], ended: list[int], asked: list[int]) -> tuple[int, str]:
    """The job's exit code and its root cause: what a rank met with itself before what it lost through another."""
    failed = [number for number in ended if ranks[number].code]
    if not failed:
        return 0, ""
    named = f"rank {{}} of {len(ranks)}: " if len(ranks) > 1 else ""
    for number in failed:
        error = ranks[number].said.get("error")
        if error and not ranks[number].said["through_another"]:
            several = sum(ranks[other].said.get("error") == error for other in failed) > 1
            return ranks[number].code or 1, error if several else named.format(number) + error
    if asked.count(signal.SIGINT) > 1:  # the ranks were killed for it
        return 130, ""
    stopped = [code for number in failed if (code := ranks[number].code) in STOPPED]
    if stopped and (asked or all("error" not in ranks[number].said for number in failed)):
        return stopped[0], ""
    for number in failed:
        code = ranks[number].code or 1
        if code > 128 and code != 128 + signal.SIGABRT:  # NCCL aborts a process that waited for another too long
            why = "; the system does that when memory runs out" if code == 128 + signal.SIGKILL else ""
            name = signal.Signals(code - 128).name
            return code, f"error: rank {number} of {len(ranks)} was ended by {name} {progress(ranks[number])}{why}"
    hung = [number for number, rank in enumerate(ranks) if number not in ended]
    if hung:
        show_stacks([ranks[number] for number in hung])
        which = ", ".join(f"rank {number} {progress(ranks[number])}" for number in hung)
        return 1, f"error: {which} did not answer the others any more (its stack is above); the job was ended"
    return ranks[failed[0]].code or 1, named.format(failed[0]) + ranks[failed[0]].said.get("error", "error: it failed")


def progress(rank: Watched) -> str:
    return f"after step {rank.said['step']}" if "step" in rank.said else "before its first step"


def show_stacks(ranks: list[Watched]) -> None:
    """Lets each print where it is (`clipft.rank` has set that up)."""
    for rank in ranks:
        rank.process.send_signal(signal.SIGUSR2)
    time.sleep(STACK_S)


def forward_to(ranks: list[Watched], number: int) -> None:
    send_all(ranks, signal.SIGTERM if number == signal.SIGHUP else number)


def send_all(ranks: list[Watched], number: int) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def end_all(ranks: list[Watched]) -> None:
    """Ends what is left of the ranks and of the processes they have started."""
    for rank in ranks:
        if rank.code != 0:
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
