"""One process per rank, watched: signals go to all, the first failure ends all, its cause is the last thing said."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
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


@dataclass
class Watched:
    """A rank's process and what it has told."""

    process: subprocess.Popen[bytes]
    reports: int
    """The end of its pipe that is read."""
    said: dict[str, Any] = field(default_factory=dict)
    """The last value of each word: step, stopped, error, ..."""
    rest: bytes = b""

    def listen(self) -> None:
        with suppress(BlockingIOError):
            while raw := os.read(self.reports, 1 << 16):
                *lines, self.rest = (self.rest + raw).split(b"\n")
                for line in lines:
                    self.said |= json.loads(line)

    @property
    def code(self) -> int | None:
        """The exit code as shells give it; None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


def is_rank() -> bool:
    """Whether torchrun started this process, as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(command: str, config_file: Path, devices: int) -> int:
    """Runs `clipft.rank` on every device of this machine; returns the exit code for the shell."""
    ranks: list[Watched] = []
    asked: list[int] = []
    port = free_port()

    def forward(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT in asked:  # ranks in foreign code do not hear it
            send_all(ranks, signal.SIGKILL)
        asked.append(number)
        forward_to(ranks, number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        for rank in range(devices):
            ranks.append(start_rank(command, config_file, rank, devices, port))
        for number in asked:  # while they were started
            forward_to(ranks, number)
        return supervise(ranks, asked)
    finally:
        end_all(ranks)
        for rank in ranks:
            os.close(rank.reports)
        for number, handler in before.items():
            signal.signal(number, handler)


def start_rank(command: str, config_file: Path, rank: int, world: int, port: int) -> Watched:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PIPE: str(writing),
    }
    # A session of its own: Ctrl-C reaches the ranks once, through us. The pipe closes when we are gone.
    process = subprocess.Popen(
        [sys.executable, "-m", "clipft.rank", command, str(config_file)],
        env=environment,
        stdin=subprocess.PIPE,
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(writing)
    return Watched(process, reading)


def supervise(ranks: list[Watched], asked: list[int]) -> int:
    """Waits for all ranks; the first that fails gives the others a grace, the cause is printed and its code returned.

    `asked` holds the signals that were sent on: ranks that end by them have not failed.
    """
    ended: list[int] = []  # in order of time
    deadline = None
    while len(ended) < len(ranks) and (deadline is None or time.monotonic() < deadline):
        for number, rank in enumerate(ranks):
            code = rank.code
            rank.listen()
            if number in ended or code is None:
                continue
            ended.append(number)
            if code and deadline is None:
                deadline = time.monotonic() + (SAVE_S if "stopped" in rank.said else GRACE_S)
                if code in STOPPED:
                    send_all(ranks, signal.SIGTERM)
        time.sleep(POLL_S)
    code, cause = what_happened(ranks, ended, asked)
    if deadline is not None:
        end_all(ranks)
    if cause:
        with suppress(OSError):  # a terminal that was closed
            print(cause, file=sys.stderr, flush=True)
    return code


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
