"""metrics.csv: one row per step, a column per metric."""

import csv
import errno
import io
import os
from pathlib import Path

from clipft.files import replace_file


class MetricsFile:
    """Appends rows to a CSV file; each is on disk when `append` returns."""

    def __init__(self, path: Path, last_step: int):
        """Opens `path`, keeping the rows up to `last_step`: what came after was not saved and will come again."""
        self.path = path
        rows = [row for row in read_rows(path) if int(row["step"]) <= last_step]
        self.columns = list(rows[0]) if rows else ["step"]
        if path.exists():
            self._rewrite(rows)

    def append(self, step: int, metrics: dict[str, float]) -> None:
        new = [name for name in metrics if name not in self.columns]
        if new:
            self._add_columns(new)
        row = {"step": str(step), **{name: f"{value:.9g}" for name, value in metrics.items()}}
        line = self._line(row).encode()
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            # A nearly full disk takes part of a line; the next one would be glued to it.
            if file.write(line) != len(line):
                os.truncate(self.path, size)
                raise OSError(errno.ENOSPC, "no room for a whole line", str(self.path))

    def _add_columns(self, new: list[str]) -> None:
        before, self.columns = self.columns, self.columns + new
        try:
            self._rewrite(read_rows(self.path))
        except OSError:
            self.columns = before
            raise

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        header = ",".join(self.columns) + "\n"
        replace_file(self.path, header + "".join(self._line(row) for row in rows))

    def _line(self, row: dict[str, str]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerow(row)
        return text.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Complete rows of the file; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    whole = path.read_text()
    whole = whole[: whole.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values()]
