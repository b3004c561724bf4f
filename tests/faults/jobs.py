"""Whole training jobs by fork: the real supervisor and real ranks, with faults at exact steps."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from clipft import launch, rank, run
from clipft.config import Config
from clipft.data.loader import Batch
from clipft.learn import saver
from clipft.learn.after_step import AfterStep
from clipft.learn.module import ContrastiveModule
from clipft.plan import resolve
from clipft.report import PIPE
from clipft.rundir import settle

LIMIT_S = 90  # for a job; then it is killed and the test fails
GONE_S = 10.0  # from a fault to the end of the job's last process
STEP_S = 1.0

Action = Callable[[Any, Any], None]  # gets module and batch where it strikes at a step
Place = tuple[Any, str]  # a function of this owner
START: Place = (run, "load_model")
FIRST_EVALUATION: Place = (run, "report_tasks")
VALIDATION: Place = (AfterStep, "_validate")
WRITING: Place = (saver, "write_state")
FINAL_EVALUATION: Place = (run, "load_exactly")


@dataclass(frozen=True)
class Fault:
    rank: int
    at: int | Place
    """The step whose start it strikes at, or the function at whose first call."""
    do: Action


@dataclass(frozen=True)
class Ended:
    """A job that is over."""

    config: Config
    path: Path
    code: int | None
    stdout: str
    stderr: str
    left: list[int]
    """Processes that were still there after the time they had."""
    took_s: float
    """From the first fault to the end of the last process."""

    @property
    def last_line(self) -> str:
        return (self.stderr.strip().splitlines() or [""])[-1]


@dataclass
class Job:
    config: Config
    path: Path
    notes: Path
    """Folder of what the job's processes leave for the test."""
    process: ForkProcess

    def sessions(self) -> set[int]:
        """The sessions that the job's processes have made; everything that they start is in one of them."""
        return {int(line) for line in read(self.notes / "sessions").split()}

    def wait(self, gone_s: float = GONE_S + STEP_S) -> Ended:
        """The job's end; whatever is left of it then is killed."""
        self.process.join(LIMIT_S)
        code = self.process.exitcode
        deadline = time.monotonic() + (gone_s if code is not None else 0)
        while (left := members(self.sessions())) and time.monotonic() < deadline:
            time.sleep(0.02)
        now = time.monotonic()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.join()
        struck = [float(line) for line in read(self.notes / "struck").split()]
        out, err = read(self.notes / "stdout"), read(self.notes / "stderr")
        return Ended(self.config, self.path, code, out, err, left, now - min(struck, default=now))


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def append(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{text}\n".encode())
    os.close(handle)


def members(sessions: set[int]) -> list[int]:
    """Running processes of these sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if state not in "ZX" and int(session) in sessions:
            found.append(int(stat.parent.name))
    return found


def go(config: Config, *faults: Fault, environment: dict[str, str] | None = None) -> Ended:
    """One start of the command, to its end."""
    return start(config, *faults, environment=environment).wait()


def start(config: Config, *faults: Fault, environment: dict[str, str] | None = None) -> Job:
    path = settle(resolve(config)).path
    attempts = path.parent / "notes" / path.name
    notes = attempts / f"{len(list(attempts.glob('*'))):03d}"
    notes.mkdir(parents=True)
    process = get_context("fork").Process(target=supervise, args=(config, path, notes, faults, environment or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        process.start()
    return Job(config, path, notes, process)


def supervise(config: Config, path: Path, notes: Path, faults: tuple[Fault, ...], environment: dict[str, str]) -> None:
    """What the command does once its config stands, with ranks that are forked."""
    enter(notes, environment)
    fork_ranks(notes, faults)
    sys.exit(launch.launch("train", path / "config.yaml", config.trainer.devices))


def enter(notes: Path, environment: dict[str, str]) -> None:
    """Makes a forked process one of its own, that prints into files."""
    become(notes)
    os.environ.update(environment)
    for name in ("stdout", "stderr"):
        print_to(name, os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)


def print_to(name: str, file: int) -> None:
    os.dup2(file, {"stdout": 1, "stderr": 2}[name])
    setattr(sys, name, os.fdopen(os.dup(file), "w", buffering=1))


def fork_ranks(notes: Path, faults: tuple[Fault, ...] = ()) -> None:
    """From here on a rank of this process is a fork, not a new interpreter that imports everything again."""
    ends: list[int] = []  # of the ranks' standard inputs, which a rank must not hold open for another

    def start_rank(
        command: str, file: Path, rank: int, world: int, port: int, environment: dict[str, str], output: int | None
    ) -> launch.Watched:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        theirs, ours = os.pipe()
        ends.append(ours)
        variables = environment | launch.rank_variables(rank, world, port) | {PIPE: str(writing)}
        mine = [fault for fault in faults if fault.rank == rank]

        def be() -> None:
            os.environ.update(variables)
            if output is not None:
                print_to("stdout", output)
                print_to("stderr", output)
            be_rank(command, file, notes, mine, theirs, [*ends, reading])

        process = Forked(be)
        os.close(writing)
        os.close(theirs)
        return launch.Watched(process, reading)

    launch.start_rank = start_rank


class Forked(subprocess.Popen):
    """A forked process behind the methods of Popen that the supervisor uses."""

    def __init__(self, target: Callable[[], None]):
        self._child_created, self.returncode = False, None  # for Popen's __del__
        self.process = get_context("fork").Process(target=target)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


def be_rank(command: str, file: Path, notes: Path, faults: list[Fault], stdin: int, foreign: list[int]) -> None:
    become(notes)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # as a new program finds them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stdin, 0)
    for handle in foreign:
        os.close(handle)
    plant(faults, notes)
    sys.exit(rank.main(command, file))


def become(notes: Path) -> None:
    os.setsid()
    append(notes / "sessions", str(os.getpid()))


def plant(faults: list[Fault], notes: Path) -> None:
    """Makes the faults strike, and each step leave the keys of its batch."""
    step = ContrastiveModule.training_step

    def strike(fault: Fault, module: Any, batch: Any) -> None:
        append(notes / "struck", str(time.monotonic()))
        fault.do(module, batch)

    def training_step(self: ContrastiveModule, batch: Batch, batch_idx: int) -> None:
        row = {"step": self.step + 1, "rank": int(os.environ["RANK"]), "lr": self.plan.lr, "keys": batch.keys}
        append(notes / "keys", json.dumps(row | {"valid": batch.valid.tolist()}))
        for fault in faults:
            if fault.at == self.step + 1:
                strike(fault, self, batch)
        step(self, batch, batch_idx)

    ContrastiveModule.training_step = training_step
    for fault in faults:
        if not isinstance(fault.at, int):
            plant_at(fault.at, lambda fault=fault: strike(fault, None, None))


def plant_at(place: Place, do: Callable[[], None]) -> None:
    """Does it at the function's first call."""
    owner, name = place
    function, done = getattr(owner, name), []

    def faulty(*arguments: Any, **named: Any) -> Any:
        if not done:
            done.append(True)
            do()
        return function(*arguments, **named)

    setattr(owner, name, faulty)
