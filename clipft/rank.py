"""python -m clipft.rank COMMAND CONFIG: one rank of a job, started by `launch`; reads no other arguments."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipft.config import Config, EvaluateConfig, ExportConfig
from clipft.rundir import load_config


def train(file: Path) -> int:
    from clipft import run
    from clipft.ranks import joined

    config = load_config(file, Config)
    with joined(config.trainer) as ranks:
        return run.train(config, file.parent, ranks)


def evaluate(file: Path) -> int:
    from clipft import run
    from clipft.ranks import joined

    config = load_config(file, EvaluateConfig)
    with joined(config.trainer) as ranks:
        return run.evaluate(config, ranks)


def export(file: Path) -> int:
    from clipft import run

    return run.export(load_config(file, ExportConfig))


JOBS: dict[str, Callable[[Path], int]] = {"train": train, "evaluate": evaluate, "export": export}


def train_under_torchrun(config: Config, settle: Callable[[Config], Path]) -> int:
    """Every rank has read the command line; rank 0 settles the run's folder, all read the config it wrote there."""
    import torch.distributed as dist

    from clipft import run
    from clipft.ranks import joined

    with joined(config.trainer) as ranks:
        said: list[str | None] = [None, None]
        if ranks.first:
            try:
                said[0] = str(settle(config))
            except ValueError as error:
                said[1] = str(error)
        if ranks.world > 1:
            dist.broadcast_object_list(said)
        if said[0] is None:
            raise ValueError(said[1])
        file = Path(said[0]) / "config.yaml"
        return run.train(load_config(file, Config), file.parent, ranks)


def guarded(job: Callable[..., int], *arguments: Any) -> int:
    """The job's exit code; 2 with one message for what the user can mend (CLIPFT_TRACEBACK=1 shows where)."""
    try:
        return job(*arguments)
    except ValueError as error:
        if os.environ.get("CLIPFT_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(guarded(JOBS[sys.argv[1]], Path(sys.argv[2])))
