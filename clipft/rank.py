"""python -m clipft.rank COMMAND CONFIG: one rank of a job, started by `launch`; reads no other arguments."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config import Config, EvaluateConfig, ExportConfig
from clipft.rundir import load_config, locked, log

if TYPE_CHECKING:
    from clipft.ranks import Ranks


def train(file: Path) -> int:
    from clipft.ranks import joined

    config = load_config(file, Config)
    with joined(config.trainer) as ranks:
        return train_in(file.parent, config, ranks)


def train_in(folder: Path, config: Config, ranks: "Ranks") -> int:
    """Trains with the run's folder locked; what goes wrong stands in its log too."""
    from clipft import run

    with locked(folder) if ranks.first else nullcontext():
        try:
            return run.train(config, folder, ranks)
        except Exception:
            log(folder, f"rank {ranks.rank}\n{traceback.format_exc()}")
            raise


def evaluate(file: Path) -> int:
    return evaluate_under_torchrun(load_config(file, EvaluateConfig))


def export(file: Path) -> int:
    from clipft import run

    return run.export(load_config(file, ExportConfig))


JOBS: dict[str, Callable[[Path], int]] = {"train": train, "evaluate": evaluate, "export": export}


def train_under_torchrun(config: Config, prepare: Callable[[Config], Path | None]) -> int:
    """Every rank has read the command line; rank 0 prepares the run's folder, all read the config it wrote there."""
    import torch.distributed as dist

    from clipft.ranks import joined

    with joined(config.trainer) as ranks:
        said: list[Any] = [None]  # a folder, None for a finished run, or what is wrong
        if ranks.first:
            try:
                said[0] = prepare(config)
            except ValueError as error:
                said[0] = error
        if ranks.world > 1:
            dist.broadcast_object_list(said)
        if isinstance(said[0], ValueError):
            raise said[0]
        if said[0] is None:
            return 0
        return train_in(said[0], load_config(said[0] / "config.yaml", Config), ranks)


def evaluate_under_torchrun(config: EvaluateConfig) -> int:
    from clipft import run
    from clipft.ranks import joined

    with joined(config.trainer) as ranks:
        return run.evaluate(config, ranks)


def guarded(job: Callable[..., int], *arguments: Any) -> int:
    """The job's exit code; 2 with one message for what the user can mend (CLIPFT_TRACEBACK=1 shows where)."""
    try:
        return job(*arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("CLIPFT_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def end_with_parent() -> None:
    """Asks for a stop when the supervisor is gone: its end of our standard input closes with it."""
    while os.read(0, 1):  # not sys.stdin: its lock would be held at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(143)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(guarded(JOBS[sys.argv[1]], Path(sys.argv[2])))
