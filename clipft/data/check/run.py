"""What is in a data set before a GPU hour is spent on it: one pass over all files, tables, a page, a Parquet file."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clipft.config import CheckConfig
from clipft.data.check.advice import Case, advice_of, trouble_of
from clipft.data.check.figures import figures_of
from clipft.data.check.items import Contents, items_of_data, items_of_source
from clipft.data.check.look import look_at_all, picture_of
from clipft.data.check.page import page_of
from clipft.data.check.parquet import findings_of
from clipft.data.check.reader import Reader
from clipft.data.check.rows import Rows, build_rows
from clipft.data.check.sections import sections_of
from clipft.data.check.terminal import text_of
from clipft.data.sources.extras import PYARROW, pip
from clipft.data.sources.row import Ask
from clipft.data.split import counted
from clipft.files import replace_file

REPORT, FINDINGS = "report.html", "findings.parquet"
PICTURE_PX = 192  # longer side, on the page


@dataclass(frozen=True)
class Report:
    case: Case
    rows: Rows
    text: str
    """For the terminal."""


def check(config: CheckConfig, reader: Reader) -> Report:
    """Looks at every sample, writes report.html and findings.parquet, and gives what the terminal shows."""
    out = None if config.out is None else out_folder(config.out)  # before a long source is read
    contents = contents_of(config)
    out = out or out_folder(f"checks/{Path(contents.name).name}")
    has_parquet = find_spec("pyarrow") is not None
    if not has_parquet:
        print(f"{FINDINGS} will not be written: {pip(PYARROW)}", flush=True)
    data = config.data
    seen = look_at_all(contents, reader.count, data.max_pixels, data.text_errors, data.workers)
    rows = build_rows(contents.items, seen)
    figures = figures_of(
        rows, contents.tars, reader.image_size, reader.context_length, data.captions, config.batch_sizes
    )
    case = Case(contents, figures, reader, data, trouble_of(contents, figures, data.max_bad_frac))
    sections, advice = sections_of(case, rows), advice_of(case)
    title = f"{contents.name}: {counted(len(rows.items), 'sample')}"
    seen_by = f"{contents.place}, as {reader.name} sees it: {reader.image_size} pixels, {reader.context_length} tokens"
    files = f"{REPORT}{f' and {FINDINGS}' if has_parquet else ''} in {out}"
    if has_parquet:
        replace_file(out / FINDINGS, findings_of(rows, figures, contents))
    page = page_of(
        title, seen_by, sections, advice, lambda row: picture_of(contents.items[row], data.max_pixels, PICTURE_PX)
    )
    replace_file(out / REPORT, page)
    return Report(case, rows, text_of(title, seen_by, sections, advice, f"Pictures and all findings: {files}"))


def contents_of(config: CheckConfig) -> Contents:
    if config.source is None:
        return items_of_data(config.data)
    return items_of_source(Ask(config.source, config.format, config.root, config.columns, config.csv))


def out_folder(name: str) -> Path:
    """The folder, made where it is missing; raises where nothing can be written into it."""
    out = Path(name).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / ".writable", "")
        (out / ".writable").unlink()
    except OSError as error:
        raise ValueError(
            f"out={name!r} cannot be written to ({error.strerror}). Name a folder with out=FOLDER."
        ) from error
    return out


def refuse(report: Report) -> None:
    """Raises when the set is of no use as it is."""
    if report.case.trouble:
        raise ValueError("\n".join(report.case.trouble))
