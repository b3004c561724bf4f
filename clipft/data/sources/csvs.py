"""CSV and its relatives: delimiter, quotes, encoding and header by looking, rows with the line they begin in."""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from clipft.config import CsvConfig
from clipft.data.sources.columns import CAPTIONS, IMAGE_NAME, IMAGES, looks_like_image, plain
from clipft.data.sources.row import Ask, Bad, Raw, Source
from clipft.data.sources.tables import Part, table_source

HEAD_BYTES, HEAD_ROWS = 1 << 18, 200
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HINTS = {
    "wrong_number_of_columns": "a delimiter inside a cell needs quotes around the cell",
    "bad_quotes": "a quote is not closed or not doubled; csv.quotes=false reads quotes as letters",
    "bad_utf8": "csv.encoding=cp1252 or another reads tables that are not UTF-8",
}
LEAST_SHARE = 0.8  # of the first rows that must have the same number of columns


@dataclass(frozen=True)
class Dialect:
    """How the cells of a table are told apart."""

    delimiter: str
    quotes: bool
    encoding: str
    header: tuple[str, ...]
    """Names of the columns; numbers from 1 where the first row is one like the others."""
    has_header: bool
    numbered: bool
    """Whether images are named as in Flickr8k.token.txt, with the number of the caption behind: 1.jpg#0."""

    @property
    def known_as(self) -> str:
        """What img2dataset calls such tables; empty where it does not read them."""
        plain = self.has_header and self.encoding in ("utf-8", "utf-8-sig")
        return {",": "csv", "\t": "tsv"}.get(self.delimiter, "") if plain else ""

    def __str__(self) -> str:
        words = ["Flickr captions" if self.numbered else "CSV", DELIMITERS.get(self.delimiter, repr(self.delimiter))]
        words += ["quotes are letters"] if not self.quotes else []
        words += [self.encoding] if self.encoding not in ("utf-8", "utf-8-sig") else []
        return ", ".join(words + ([] if self.has_header else ["no header"]))


def csv_source(ask: Ask, parts: list[Part]) -> Source:
    dialects = {part.path: find_dialect(ask, part.path) for part in parts}
    read = partial(read_parts, dialects)
    first = dialects[parts[0].path]
    source = table_source(ask, str(first), parts, read, "line", known_as=first.known_as)
    return replace(source, hints={**source.hints, **HINTS})


def read_parts(dialects: dict[Path, Dialect], path: Path) -> Iterator[Raw | Bad]:
    return read_csv(path, dialects[path])


def read_csv(path: Path, dialect: Dialect) -> Iterator[Raw | Bad]:
    """The rows; every line that a broken quote swallows is a Bad of its own."""
    with open(path, encoding=dialect.encoding, errors="surrogateescape", newline="") as file:
        reader = reader_of(file, dialect.delimiter, dialect.quotes)
        line, first = 1, dialect.has_header
        while True:
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if first:
                    first = False
                elif any(cell.strip() for cell in cells):
                    yield to_raw(line, cells, dialect)
            except csv.Error:
                yield from (Bad(n, "bad_quotes") for n in range(line, reader.line_num + 1))
            line = reader.line_num + 1


def reader_of(file: Iterator[str], delimiter: str, quotes: bool):
    return csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE, strict=quotes)


def to_raw(line: int, cells: list[str], dialect: Dialect) -> Raw | Bad:
    if len(cells) != len(dialect.header):
        return Bad(line, "wrong_number_of_columns")
    values = {name: cell for name, cell in zip(dialect.header, cells, strict=True) if name}
    if not "".join(cells).isascii() and not is_text("".join(cells)):
        return Bad(line, "bad_utf8")
    if dialect.numbered:
        first = dialect.header[0]
        values[first] = values[first].rpartition("#")[0]
    return Raw(line, values)


def is_text(text: str) -> bool:
    """False where bytes were no letters of the encoding: they came as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


@dataclass(frozen=True)
class Cut:
    """The first rows, cut in one of the possible ways."""

    delimiter: str
    quotes: bool
    rows: list[list[str]]

    @property
    def num_bad(self) -> int:
        """Rows that have not as many cells as the first."""
        return sum(not row or len(row) != len(self.rows[0]) for row in self.rows)

    @property
    def is_table(self) -> bool:
        regular = 1 - self.num_bad / len(self.rows) >= LEAST_SHARE
        return len(self.rows[0]) > 1 and (regular or known_cells(self.rows[0]) > 1)

    @property
    def rank(self) -> tuple[int, float]:
        return known_cells(self.rows[0]), -self.num_bad / len(self.rows)


def find_dialect(ask: Ask, path: Path) -> Dialect:
    """The dialect in which the first rows have equally many columns, and a header that we know, or an image name."""
    given = ask.csv
    encoding, text = head_of(path, given)
    delimiters = [given.delimiter] if given.delimiter else list(DELIMITERS)
    quotings = [True, False] if given.quotes is None else [given.quotes]
    if not text.strip():
        return Dialect(delimiters[0], quotings[0], encoding, (), True, False)
    cuts = []
    for delimiter in delimiters:
        cut = [Cut(delimiter, quotes, parse(text, delimiter, quotes)) for quotes in quotings]
        cuts.append(min(cut, key=lambda each: (not each.is_table, each.num_bad)))  # of equal ones with quotes
    found = [cut for cut in cuts if cut.is_table]
    if not found:
        raise ValueError(
            f"{path} does not look like a table: no comma, tab, semicolon or bar cuts its first lines into equally "
            "many columns. Expected a line per row such as a.jpg,a red ball; or say csv.delimiter=, csv.quotes= or "
            "csv.encoding=."
        )
    best = [cut for cut in found if cut.rank == max(each.rank for each in found)]
    if path.suffix.lower() == ".tsv":
        best = [cut for cut in best if cut.delimiter == "\t"] or best
    if len(best) > 1:
        names = ["tab" if cut.delimiter == "\t" else cut.delimiter for cut in best]
        choices = " or ".join(f"csv.delimiter='{name}'" for name in names)
        raise ValueError(f"{path} can be cut in several ways. Decide: {choices}.")
    return with_header(path, best[0], encoding)


def with_header(path: Path, cut: Cut, encoding: str) -> Dialect:
    rows = cut.rows
    has_header = not any(looks_like_image(cell) for cell in rows[0])
    names = [cell.strip() for cell in rows[0]] if has_header else [str(n) for n in range(1, len(rows[0]) + 1)]
    numbered = not has_header and all("#" in row[0] and IMAGE_NAME.search(row[0]) for row in rows if row)
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: column {twice[0]!r} stands twice in the header. Give each column a name of its own.")
    return Dialect(cut.delimiter, cut.quotes, encoding, tuple(names), has_header, numbered)


def head_of(path: Path, given: CsvConfig) -> tuple[str, str]:
    """The encoding, and the first lines as text."""
    with open(path, "rb") as file:
        raw = file.read(HEAD_BYTES)
        whole = not file.read(1)
    encoding = given.encoding or next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
    text = codecs.getincrementaldecoder(encoding)("surrogateescape").decode(raw)
    return encoding, text if whole else text[: text.rfind("\n") + 1] or text


def parse(text: str, delimiter: str, quotes: bool) -> list[list[str]]:
    """The first rows; one with a broken quote has no cells."""
    reader, rows = reader_of(io.StringIO(text, newline=""), delimiter, quotes), []
    while len(rows) < HEAD_ROWS:
        try:
            row = next(reader, None)
        except csv.Error:
            rows.append([])
            continue
        if row is None:
            break
        if row:
            rows.append(row)
    return rows or [[]]


def known_cells(row: list[str]) -> int:
    """How much speaks for this being the header, or the first row: names that we know, names of images."""
    return sum(plain(cell) in IMAGES + CAPTIONS or looks_like_image(cell) for cell in row)
