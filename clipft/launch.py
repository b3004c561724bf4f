"""One process per rank, watched: signals go to all, the first failure ends all, its code is the job's."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

GRACE_S = 10.0  # for the other ranks once one has failed
SAVE_S = 120.0  # for the other ranks once one has stopped as it was asked to: the first one may still be saving
POLL_S = 0.05


def is_rank() -> bool:
    """Whether torchrun started this process, as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(command: str, config_file: Path, devices: int) -> int:
    """Runs `clipft.rank` on every device of this machine; returns the exit code for the shell."""
    ranks: list[subprocess.Popen[bytes]] = []
    port = free_port()

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        for rank in range(devices):
            ranks.append(start_rank(command, config_file, rank, devices, port))
        return supervise(ranks)
    finally:
        end_all(ranks, grace_s=0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def start_rank(command: str, config_file: Path, rank: int, world: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # A session of its own: Ctrl-C reaches the ranks once, through us. The pipe closes when we are gone.
    return subprocess.Popen(
        [sys.executable, "-m", "clipft.rank", command, str(config_file)],
        env=environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def supervise(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks; the first that fails gives the others GRACE_S and the job its exit code."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            end_all(ranks, SAVE_S if failed[0] in (130, 143) else GRACE_S)
            return 128 - failed[0] if failed[0] < 0 else failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


def end_all(ranks: list[subprocess.Popen[bytes]], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)
    for process in ranks:
        if process.poll() is None:
            process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
