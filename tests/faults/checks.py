"""What must hold after any fault."""

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jobs import GONE_S, STEP_S, Ended, go, read
from small import outcome

from clipft.config import Config
from clipft.learn.checkpoint import read_state
from clipft.rundir import read_results


def check(
    ended: Ended,
    code: int,
    like: Path | None,
    *,
    again: Config | None = None,
    exact: bool = True,
    gone_s: float = GONE_S + STEP_S,
) -> Ended:
    """What must hold after any fault; then the same command (or `again`) goes on and ends like the calm run `like`.

    Returns the last start.
    """
    assert ended.code == code, ended.stderr
    assert not ended.left and (code == 0 or ended.took_s < gone_s)
    check_files(ended.path, ended.config)
    if like is None:
        return ended
    last = go(again or ended.config) if code else ended
    assert last.code == 0, last.stderr
    assert not last.left
    assert not list(last.path.rglob(".*.tmp"))
    check_files(last.path, last.config)
    check_alike(last.path, like, exact)
    return last


def check_files(path: Path, config: Config) -> None:
    """Every file under its final name is whole, and every sample is accounted for."""
    batch_size, folder = config.train.batch_size, path / "checkpoints"
    rows = whole_rows(path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    for file in folder.glob("*.ckpt"):
        of = read_state(file)["clipft"]
        dropped = sum(of["ledger"]["dropped"].values())
        assert of["ledger"]["used"] + dropped == of["step"] * batch_size
        assert dropped == sum(int(float(row["train/dropped"])) for row in rows[: of["step"]])
    manifest = folder / "manifest.json"
    entries: dict[str, Any] = json.loads(manifest.read_text()) if manifest.exists() else {}
    for name, entry in entries.items():
        assert entry["used"] + sum(entry["dropped"].values()) == entry["step"] * batch_size
        if (folder / name).exists() and read_state(folder / name)["clipft"]["step"] == entry["step"]:
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    meta = read_results(path).get("meta", {})
    if "ledger" in meta:
        of = meta["ledger"]
        parts = [of["used"], *of["dropped"].values(), of["left_out"], of["not_reached"]]
        assert of["indexed"] == sum(parts)


def whole_rows(path: Path) -> list[dict[str, str]]:
    """All lines of the file, of which at most the last may be a part (a kill cut it)."""
    text = read(path)
    rows = list(csv.DictReader(text.splitlines()))
    if text and not text.endswith("\n"):
        rows.pop()
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def check_alike(path: Path, like: Path, exact: bool) -> None:
    """The same weights, rows, results and files; without `exact` weights to 1e-5 of their norm and the same steps."""
    if exact:
        mine, theirs = outcome(path), outcome(like)
        mine["files"] = [name for name in mine["files"] if not name.endswith(".damaged")]
        assert mine == theirs
        return
    assert distance(path, like) < 1e-5
    mine, theirs = whole_rows(path / "metrics.csv"), whole_rows(like / "metrics.csv")
    assert len(mine) == len(theirs)
    for row, other in zip(mine, theirs, strict=True):
        assert math.isclose(float(row["train/loss"]), float(other["train/loss"]), rel_tol=1e-4)


def distance(path: Path, like: Path) -> float:
    """Norm of the difference of all last weights, relative to theirs."""
    one, other = (read_state(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (path, like))
    squares = sum(((one[name] - other[name]) ** 2).sum() for name in one)
    return float((squares / sum((value**2).sum() for value in other.values())) ** 0.5)


def keys_of(path: Path) -> dict[int, list[str]]:
    """The global batch of each step, over all starts of the run: a step that came twice must have come alike."""
    parts: dict[tuple[int, int, int], list[str]] = {}
    for file in sorted((path.parent / "notes" / path.name).glob("*/keys")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            parts[int(file.parent.name), row["step"], row["rank"]] = row["keys"]
    batches: dict[tuple[int, int], list[str]] = {}
    for (attempt, step, _), keys in sorted(parts.items()):
        batches.setdefault((attempt, step), []).extend(keys)
    found: dict[int, list[str]] = {}
    for (_, step), keys in batches.items():
        assert found.setdefault(step, keys) == keys
    return found
