"""results.json -> the before/after table, in plain characters that any terminal, log file or README shows."""

from io import StringIO, TextIOWrapper
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = ("model", "base", "best", "last")  # model: a single measurement, without a run
MIN_WIDTH = 80
ABSENT = "-"


def print_results(results: dict[str, Any], file: TextIO | TextIOWrapper | StringIO | None = None) -> None:
    """Writes a table per data set, headed by the split and the sizes of the galleries."""
    console = Console(file=file, markup=False, highlight=False)
    console.width = max(console.width, MIN_WIDTH)
    for source in sources(results):
        console.print(Text(headline(source, results.get("meta", {}))), soft_wrap=True)
        console.print(build_table(source, results))


def sources(results: dict[str, Any]) -> list[str]:
    """Names of the data sets in any column, in the order in which they first come."""
    keys = [key for column in COLUMNS for key in results.get(column) or {}]
    return list(dict.fromkeys(key.rpartition("/")[0] for key in keys))


def headline(source: str, meta: dict[str, Any]) -> str:
    """Such as "emoji, test split: 1,000 images, 5,000 captions (4,970 distinct); dropped: 2 no_caption"."""
    gallery = meta.get("gallery", {}).get(source, {})
    split = gallery.get("split", meta.get("split"))
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in gallery.get("dropped", {}).items())
    name = source + (f", {split} split" if split else "")
    sizes = ", ".join(size_words(gallery))
    return (f"{name}: {sizes}" if sizes else name) + (f"; dropped: {dropped}" if dropped else "")


def size_words(gallery: dict[str, Any]) -> list[str]:
    words = []
    if "images" in gallery:
        words.append(f"{gallery['images']:,} images")
        words.append(f"{gallery['captions']:,} captions ({gallery['distinct_captions']:,} distinct)")
    if "labelled_images" in gallery:
        words.append(f"{gallery['labelled_images']:,} labelled images in {gallery['classes']:,} classes")
    return words


def build_table(source: str, results: dict[str, Any]) -> Table:
    """Rows: metrics. Columns: base, best step, last step, and the change from base to best."""
    shown = [column for column in COLUMNS if results.get(column)]
    compared = "base" in shown and "best" in shown
    table = Table(box=box.MARKDOWN)
    table.add_column("metric", no_wrap=True)
    for name in [*shown, *(["change"] if compared else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for metric in metrics_of(source, results):
        values = {column: results[column].get(f"{source}/{metric}") for column in shown}
        cells = [ABSENT if value is None else number(metric, value) for value in values.values()]
        table.add_row(metric, *cells, *([change(metric, values["base"], values["best"])] if compared else []))
    return table


def metrics_of(source: str, results: dict[str, Any]) -> list[str]:
    keys = [key for column in COLUMNS for key in results.get(column) or {}]
    names = [key.rpartition("/")[2] for key in keys if key.rpartition("/")[0] == source]
    return list(dict.fromkeys(names))


def number(metric: str, value: float, sign: str = "") -> str:
    """Ranks with one decimal, shares with four."""
    return format(value, f"{sign},.1f" if metric.endswith("rank") else f"{sign}.4f")


def change(metric: str, before: float | None, after: float | None) -> str:
    return ABSENT if before is None or after is None else number(metric, after - before, sign="+")
