"""A comparison as one HTML page that needs nothing else: tables, figures as inline SVG, and where
the numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from attnzoo.fidelity.comparison_rows import Comparison, Row
from attnzoo.report.comparison_columns import (
    COLUMNS,
    Column,
    comparison_table,
    group_title,
    grouped,
    lost,
    notes,
)
from attnzoo.report.document import document
from attnzoo.report.export import inline_svg
from attnzoo.report.figures import Drawing, drawings
from attnzoo.report.headlines import headlines
from attnzoo.report.result import Result
from attnzoo.report.tables import describe_sample, sample_of

TITLE = "Attention variants against exact attention"
LAW = (
    "Every variant answers A(q, k)&thinsp;·&thinsp;v with an A of its own. Here each A is set "
    "beside softmax's, on the same queries, keys and "
    "values. The first question is whether a variant comes closer than the mean of the values, "
    "which looks at nothing."
)


def comparison_result(comparison: Comparison) -> Result:
    """A comparison with its tables, figures, page and JSON file."""
    cut = comparison.environment.get("interrupted", "")
    return Result(
        "compare",
        comparison.rows,
        (
            comparison_table(comparison.rows),
            comparison_table(comparison.by_length, "by_length"),
        ),
        lambda: drawings(comparison),
        lambda: page(comparison),
        {"compare.json": lambda: comparison.to_json() + "\n"},
        f"interrupted {cut}" if cut else "",
    )


def page(comparison: Comparison) -> str:
    """The whole page, deterministic in `comparison`."""
    body = "\n".join(
        [*_results(comparison), *_figures(comparison), *_meanings(), *_provenance(comparison)]
    )
    return document(TITLE, LAW, body)


def _results(comparison: Comparison) -> Iterator[str]:
    said = headlines(comparison)
    for group, rows in grouped(comparison.rows).items():
        title = group_title(group)
        yield f"<section>\n<h2>{escape(title)}</h2>"
        sample = sample_of(comparison, rows[0])
        if sample is not None:
            yield f'<p class="soft">{escape(describe_sample(sample))}</p>'
        yield (
            "<ul>"
            + "".join(f"<li>{escape(_typeset(sentence))}</li>" for sentence in said[title])
            + "</ul>"
        )
        yield _table(rows)
        yield from _notes(rows)
        yield "</section>"


def _table(rows: list[Row]) -> str:
    head = "".join(
        f'<th scope="col"{_aligned(column)}>{escape(column.heading).replace(" ", "<br>")}</th>'
        for column in COLUMNS
    )
    body = "\n".join(
        "<tr>" + "".join(_cell(column, row) for column in COLUMNS) + "</tr>" for row in rows
    )
    return (
        '<div class="scroll" '
        f'tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>'
    )


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
    noted = [
        f"<li><strong>{escape(labels)}</strong>: {escape(note)}</li>"
        for note, labels in notes(rows).items()
    ]
    if noted:
        yield f'<ul class="notes">{"".join(noted)}</ul>'


def _figures(comparison: Comparison) -> Iterator[str]:
    yield "<section>\n<h2>Figures</h2>"
    for drawing in drawings(comparison):
        yield f"<figure>\n<h3>{escape(drawing.title)}</h3>"
        yield f"<figcaption>{escape(drawing.caption)}</figcaption>"
        yield f'<div class="panels">{_panels(drawing)}</div>\n</figure>'
    yield "</section>"


def _panels(drawing: Drawing) -> str:
    several = len(drawing.parts) > 1
    return "\n".join(
        inline_svg(
            part,
            f"{drawing.name}-{index}",
            f"{drawing.title}, panel {index}" if several else drawing.title,
        )
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
        yield (
            f"<dt>{escape(sample['model'])}, "
            f"{sample['length']:,}</dt><dd>{escape(describe_sample(sample))}</dd>"
        )
    for key, value in comparison.environment.items():
        yield f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>\n</section>"
