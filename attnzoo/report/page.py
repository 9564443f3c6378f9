"""A comparison as one HTML page that needs nothing else: tables, figures as inline SVG, and where the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from attnzoo.fidelity.rows import Comparison, Row
from attnzoo.report.columns import COLUMNS, Column, group_title, grouped, lost, notes
from attnzoo.report.export import inline_svg
from attnzoo.report.figures import Drawing, drawings
from attnzoo.report.headlines import headlines
from attnzoo.report.tables import describe_sample, sample_of

TITLE = "Attention variants against exact attention"
LAW = (
    "Every variant answers A(q, k)&thinsp;·&thinsp;v with an A of its own. Here each A is set beside softmax's, on the same queries, keys and "
    "values. The first question is whether a variant comes closer than the mean of the values, which looks at nothing."
)

STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2328; --faint: #d0d7de; --soft: #59636e; --paper: #ffffff; --raised: #f6f8fa; --bad: #b42318; --good: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #3d444d; --soft: #9198a1; --paper: #0d1117; --raised: #151b23; --bad: #ff7b72; --good: #56d364; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0.5rem 0; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.6rem; padding-top: 1rem; border-top: 1px solid var(--faint); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.3rem; }
p, li, figcaption { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
.soft, figcaption, .notes { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; border: 1px solid var(--faint); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.65rem; text-align: right; vertical-align: baseline; white-space: nowrap; border-bottom: 1px solid var(--faint); }
thead th { background: var(--raised); color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
th.text, td.text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600; white-space: normal; min-width: 5.5rem; max-width: 15rem; }
thead th:first-child { position: sticky; left: 0; }
.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); font-weight: 600; }
figure { margin: 0; }
.panels { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem 2rem; margin-top: 0.6rem; overflow-x: auto; }
.panels svg { flex: 1 1 20rem; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.2rem; font-size: 0.92rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
"""


def page(comparison: Comparison) -> str:
    """The whole page, deterministic in `comparison`."""
    body = "\n".join([*_results(comparison), *_figures(comparison), *_meanings(), *_provenance(comparison)])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n<p>{LAW}</p>\n{body}\n</body>\n</html>\n"
    )


def _results(comparison: Comparison) -> Iterator[str]:
    said = headlines(comparison)
    for group, rows in grouped(comparison.rows).items():
        title = group_title(group)
        yield f"<section>\n<h2>{escape(title)}</h2>"
        sample = sample_of(comparison, rows[0])
        if sample is not None:
            yield f'<p class="soft">{escape(describe_sample(sample))}</p>'
        yield "<ul>" + "".join(f"<li>{escape(_typeset(sentence))}</li>" for sentence in said[title]) + "</ul>"
        yield _table(rows)
        yield from _notes(rows)
        yield "</section>"


def _table(rows: list[Row]) -> str:
    head = "".join(f'<th scope="col"{_aligned(column)}>{escape(column.heading).replace(" ", "<br>")}</th>' for column in COLUMNS)
    body = "\n".join("<tr>" + "".join(_cell(column, row) for column in COLUMNS) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'


def _cell(column: Column, row: Row) -> str:
    text = escape(_typeset(column.text(row)))
    if column is COLUMNS[0]:
        return f'<th scope="row" class="text">{_breakable(text)}</th>'
    if column.heading == "error" and row.output_error is not None:
        return f'<td class="{"bad" if lost(row) else "good"}">{text}</td>'
    return f"<td{_aligned(column)}>{text}</td>"


def _breakable(label: str) -> str:
    """A label that a narrow screen may break after its punctuation only."""
    return re.sub(r"([=_])", r"\1<wbr>", label)


def _aligned(column: Column) -> str:
    return "" if column.numeric else ' class="text"'


def _typeset(text: str) -> str:
    """ASCII of the terminal as a page writes it: 2.1x -> 2.1×, us -> µs, a lone - as a dash."""
    if text == "-":
        return "–"
    return re.sub(r"(\d) us$", r"\1 µs", re.sub(r"(?<=\d)x\b", "×", text))


def _notes(rows: list[Row]) -> Iterator[str]:
    noted = [f"<li><strong>{escape(labels)}</strong>: {escape(note)}</li>" for note, labels in notes(rows).items()]
    if noted:
        yield f'<ul class="notes">{"".join(noted)}</ul>'


def _figures(comparison: Comparison) -> Iterator[str]:
    yield "<section>\n<h2>Figures</h2>"
    for drawing in drawings(comparison):
        yield f"<figure>\n<h3>{escape(drawing.title)}</h3>\n<figcaption>{escape(drawing.caption)}</figcaption>"
        yield f'<div class="panels">{_panels(drawing)}</div>\n</figure>'
    yield "</section>"


def _panels(drawing: Drawing) -> str:
    several = len(drawing.parts) > 1
    return "\n".join(
        inline_svg(part, f"{drawing.name}-{index}", f"{drawing.title}, panel {index}" if several else drawing.title)
        for index, part in enumerate(drawing.parts, 1)
    )


def _meanings() -> Iterator[str]:
    yield "<section>\n<h2>What the columns mean</h2>\n<dl>"
    for column in COLUMNS:
        yield f"<dt>{escape(column.heading)}</dt><dd>{escape(column.meaning)}</dd>"
    yield "</dl>\n</section>"


def _provenance(comparison: Comparison) -> Iterator[str]:
    yield "<section>\n<h2>Where the numbers come from</h2>\n<dl>"
    for sample in comparison.samples:
        yield f"<dt>{escape(sample['model'])}, {sample['length']:,}</dt><dd>{escape(describe_sample(sample))}</dd>"
    for key, value in comparison.environment.items():
        yield f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>\n</section>"
