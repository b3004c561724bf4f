"""The parts of a report as one HTML page: no script, nothing from elsewhere, pictures inside."""

import base64
import html
from collections.abc import Callable, Iterator

from clipft.data.check.sections import Grid, Section, Strip
from clipft.data.check.terminal import is_number
from clipft.data.sample import printable

# Nothing may be loaded or run, whatever stands in captions.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5d6670; --line: #d9dee3; --ground: #fff; --tint: #f3f5f7;
  --bar: #3d78b8; --mark: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa4ae; --line: #39424b; --ground: #15191d;
  --tint: #1f252b; --bar: #6aa3dd; --mark: #f0a35c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.25rem 0 .4rem; font-weight: 600; }
p { margin: .3rem 0; color: var(--soft); }
.advice { margin: 1.25rem 0; padding: .9rem 1.1rem .9rem 2rem; background: var(--tint);
  border-left: 4px solid var(--mark); }
.advice li { margin: .4rem 0; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
td.w { min-width: 7rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .6rem; margin: .5rem 0 1rem;
  max-width: 40rem; font-size: .85rem; font-variant-numeric: tabular-nums; align-items: center; }
.bars span { text-align: right; } .bars div { height: .8rem; } .bars i { display: block; height: 100%; min-width: 1px;
  background: var(--bar); border-radius: 2px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .7rem; margin: 0 0 1rem; }
figure { margin: 0; } figcaption { font-size: .75rem; line-height: 1.3; color: var(--soft); margin-top: .25rem; }
figcaption b { font-weight: 400; color: var(--ink); display: -webkit-box; -webkit-line-clamp: 4;
  -webkit-box-orient: vertical; overflow: hidden; }
img, .gone { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--tint); border-radius: 4px;
  display: block; }
@media (max-width: 34rem) { table { font-size: .8rem; } th, td { padding-right: .5rem; } td.w { min-width: 0; }
  td.w:first-child { min-width: 6rem; } .strip { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); } }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
"""


def page_of(
    title: str, about: str, sections: list[Section], advice: list[str], picture: Callable[[int], bytes | None]
) -> str:
    """The page; `picture` gives a row's JPEG."""
    body = [f"<h1>{said(title)}</h1>", f"<p>{said(about)}</p>"]
    body += ['<ul class="advice">', *(f"<li>{said(sentence)}</li>" for sentence in advice), "</ul>"]
    for section in sections:
        body.append(f"<h2>{said(section.title)}</h2>")
        body += [f"<p>{said(note)}</p>" for note in section.notes]
        body += [grid_html(grid) for grid in section.grids]
        body += [folded_html(grid) for grid in section.page_only]
        body += bars_html(section.bars, section.bars_of)
        body += [strip_html(strip, picture) for strip in section.strips]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{said(title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def said(text: str) -> str:
    """The text as a page shows it, whatever signs it has."""
    return html.escape(printable(text))


def grid_html(grid: Grid) -> str:
    words = [n < grid.left or not any(is_number(row[n]) for row in grid.rows) for n in range(len(grid.header))]
    kinds = ['class="w"' if word else 'class="n"' for word in words]
    head = "".join(f"<th {kind}>{said(cell)}</th>" for kind, cell in zip(kinds, grid.header, strict=True))
    rows = (
        "".join(f"<td {kind}>{said(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in grid.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded_html(grid: Grid) -> str:
    return f"<details><summary>{len(grid.rows):,} rows: {said(grid.header[0])}</summary>{grid_html(grid)}</details>"


def bars_html(bars: list[tuple[str, int]], what: str) -> Iterator[str]:
    most = max((number for _, number in bars), default=0)
    if not most:
        return
    cells = "".join(
        f"<span>{said(label)}</span><div>{bar_html(number / most)}</div><span>{number:,}</span>"
        for label, number in bars
    )
    yield f'<h3>{said(what)}</h3><div class="bars">{cells}</div>'


def bar_html(share: float) -> str:
    return f'<i style="width:{100 * share:.1f}%"></i>' if share else ""


def strip_html(strip: Strip, picture: Callable[[int], bytes | None]) -> str:
    figures = []
    for each in strip.pictures:
        raw = picture(each.row)
        source = f"data:image/jpeg;base64,{base64.b64encode(raw).decode()}" if raw else ""
        shown = f'<img src="{source}" alt="{said(each.words)}">' if raw else '<div class="gone"></div>'
        words = f"<b>{said(each.words)}</b>{said(each.key)}" if each.words else said(each.key)
        figures.append(f'<figure title="{said(each.key)}">{shown}<figcaption>{words}</figcaption></figure>')
    return f'<h3>{said(strip.title)}</h3><div class="strip">{"".join(figures)}</div>'
