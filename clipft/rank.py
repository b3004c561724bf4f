"""python -m clipft.rank COMMAND CONFIG: one rank of a job, started by `launch`; reads no other arguments."""

import atexit
import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clipft.config import Config, EvaluateConfig, ExportConfig
from clipft.learn.stop import StopRequest
from clipft.report import RunFailed, supervised, tell
from clipft.rundir import load_config, locked, log, what_matters

if TYPE_CHECKING:
    from clipft.ranks import Ranks

# Large tensors on a CPU lie in huge pages: ViT-B-32's image tower then takes 15 % less time. Read at the first of them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def train(file: Path) -> int:
    with ending_children(), stoppable() as stop:
        with without_collection():
            from clipft.ranks import joined

        config = load_config(file, Config)
        with joined(config.trainer) as ranks:
            return train_in(file.parent, config, ranks, stop)


def train_in(folder: Path, config: Config, ranks: "Ranks", stop: StopRequest) -> int:
    """Trains with the run's folder locked; what goes wrong stands in its log too."""
    run = imported_run()
    with locked(folder) if ranks.first else nullcontext():
        try:
            return run.train(config, folder, ranks, stop)
        except Exception:
            log(folder, f"rank {ranks.rank}\n{traceback.format_exc()}")
            raise


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Stop signals end the job with their exit code from here on; after SIGUSR1 Slurm starts it again."""
    stop = StopRequest()
    stop.install()
    try:
        yield stop
    finally:
        stop.uninstall()
        if stop.agreed == "SIGUSR1" and os.environ.get("RANK", "0") == "0":
            requeue()


@contextmanager
def ending_children() -> Iterator[None]:
    """Kills at the end what is left of loader processes: Python would wait for one that hangs, and never end."""
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises over each of them
        for child in multiprocessing.active_children():
            child.kill()


def imported_run() -> ModuleType:
    with without_collection(), without("wandb"):
        import open_clip  # noqa: F401

        from clipft import run
    return run


@contextmanager
def without_collection() -> Iterator[None]:
    """For imports: they make little garbage, and looking for it takes a tenth of their time, then and later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind counts what is left at the end as leaked
        gc.enable()


@contextmanager
def without(package: str) -> Iterator[None]:
    """As if the package were not installed: timm imports wandb, which takes half a second, for its own trainer."""
    known = package in sys.modules
    if not known:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not known:
            del sys.modules[package]


def requeue() -> None:
    """Asks Slurm to start this job again; without Slurm nothing happens."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", "") + "_" + os.environ.get("SLURM_ARRAY_TASK_ID", "")
    job = job if len(job) > 1 else os.environ.get("SLURM_JOB_ID", "")
    if not job:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"warning: Slurm was not asked to start job {job} again: {error}", file=sys.stderr, flush=True)


def evaluate(file: Path) -> int:
    return evaluate_under_torchrun(load_config(file, EvaluateConfig))


def export(file: Path) -> int:
    return imported_run().export(load_config(file, ExportConfig))


JOBS: dict[str, Callable[[Path], int]] = {"train": train, "evaluate": evaluate, "export": export}


def train_under_torchrun(config: Config, prepare: Callable[[Config], Path | None]) -> int:
    """Every rank has read the command line; rank 0 prepares the run's folder, all read the config it wrote there."""
    with ending_children(), stoppable() as stop:
        from clipft.ranks import check_alike, first_to_all, joined

        with joined(config.trainer) as ranks:
            check_alike({key: str(value) for key, value in what_matters(config).items()})
            folder = first_to_all(ranks, lambda: prepare(config))
            if folder is None:
                return 0
            return train_in(folder, load_config(folder / "config.yaml", Config), ranks, stop)


def evaluate_under_torchrun(config: EvaluateConfig) -> int:
    run = imported_run()
    from clipft.ranks import joined

    with ending_children(), joined(config.trainer) as ranks:
        return run.evaluate(config, ranks)


def guarded(job: Callable[..., int], *arguments: Any) -> int:
    """The job's exit code: 2 for what the user can mend before the next start, 1 for what went wrong on the way."""
    try:
        return job(*arguments)
    except (ValueError, OSError, RunFailed) as error:
        where = traceback.format_exc() if os.environ.get("CLIPFT_TRACEBACK") else ""
        say_error(f"{where}error: {error}", error)
        return 1 if isinstance(error, RunFailed) else 2
    except Exception as error:
        say_error(traceback.format_exc().rstrip(), error)
        return 1


def say_error(text: str, error: Exception) -> None:
    """Leaves the error to the supervisor, who knows which rank's is the cause of the others'; else prints it."""
    if supervised():
        tell(error=text, through_another=is_through_another(error))
    else:
        print(text, file=sys.stderr, flush=True)


def is_through_another(error: Exception) -> bool:
    """Whether the error is that another rank is gone, or does not answer."""
    from torch.distributed import DistError

    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out")
    return isinstance(error, DistError) or (type(error) is RuntimeError and any(word in str(error) for word in words))


def end_with_parent() -> None:
    """Asks for a stop when the supervisor is gone: its end of our standard input closes with it."""
    while os.read(0, 1):  # not sys.stdin: its lock would be held at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(143)


def main(command: str, file: Path) -> int:
    """Does the command as one rank; returns the exit code."""
    faulthandler.register(signal.SIGUSR2, all_threads=False)  # the supervisor asks a rank that hangs where it is
    threading.Thread(target=end_with_parent, daemon=True).start()
    return guarded(JOBS[command], file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
