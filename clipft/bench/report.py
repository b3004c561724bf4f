"""Rows of figures -> a table for the terminal and a JSON file that says how and where they were made."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from clipft.files import replace_file

PACKAGES = ("clipft", "torch", "torchvision", "pytorch-lightning", "open_clip_torch", "timm", "webdataset", "pillow")
Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """The middle of several figures, and how far they lie apart."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round: what slows down the machine in a round slows down both."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def show(title: str, rows: Sequence[Row]) -> None:
    """The rows as a table with a column for each key, in the order in which keys come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    print("\n".join(["", title, *lines]), flush=True)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def write(out: Path, benchmark: str, rows: Sequence[Row]) -> None:
    """Puts the rows, the command and the machine into <out>/<benchmark>.json."""
    out.mkdir(parents=True, exist_ok=True)
    plain = [{key: asdict(each) if isinstance(each, Spread) else each for key, each in row.items()} for row in rows]
    content = {"benchmark": benchmark, "rows": plain, "command": command(), **machine()}
    file = out / f"{benchmark}.json"
    replace_file(file, json.dumps(content, indent=1) + "\n")
    print(f"{file}", flush=True)


def command() -> str:
    return " ".join(["python -m clipft.bench", *sys.argv[1:]])


def machine() -> Row:
    """Date, processor, GPU and versions."""
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_name(),
    }
    found |= {"omp_num_threads": os.environ.get("OMP_NUM_THREADS"), "python": platform.python_version()}
    return found | {"versions": {name: version_of(name) for name in PACKAGES}}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gpu_name() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
