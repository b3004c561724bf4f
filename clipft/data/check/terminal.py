"""The parts of a report as plain text for a terminal or a log."""

from collections.abc import Iterator

from clipft.data.check.sections import Grid, Section
from clipft.data.sample import printable

BAR = 40  # signs of the longest bar


def text_of(title: str, about: str, sections: list[Section], advice: list[str], end: str) -> str:
    """All of it; pictures are left to the page."""
    lines = [printable(title), printable(about)]
    for section in sections:
        if section.notes or section.grids or section.bars:
            lines += ["", section.title.upper(), *map(printable, section.notes)]
            for grid in section.grids:
                lines += grid_lines(grid)
            lines += bar_lines(section.bars, section.bars_of)
    lines += ["", "WHAT THAT MEANS FOR A RUN", *(f"- {printable(sentence)}" for sentence in advice), "", printable(end)]
    return "\n".join(lines)


def grid_lines(grid: Grid) -> Iterator[str]:
    """The columns as wide as their longest cell, numbers to the right; the last one may be a sentence."""
    cells = [grid.header, *([printable(cell) for cell in row] for row in grid.rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(grid.header))]
    words = {n for n in range(len(widths)) if n < grid.left or not any(is_number(row[n]) for row in grid.rows)}
    for row in cells:
        padded = (c.ljust(w) if n in words else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(padded).rstrip()


def is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] == "<"


def bar_lines(bars: list[tuple[str, int]], what: str) -> Iterator[str]:
    most = max((number for _, number in bars), default=0)
    width = max((len(label) for label, _ in bars), default=0)
    if most:
        yield f"{what}:"
    for label, number in bars:
        yield f"{label:>{width}} {'#' * -(-BAR * number // most):<{BAR}} {number:,}"
