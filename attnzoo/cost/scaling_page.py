"""The scaling tables and figures as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import escape

from attnzoo.cost.scaling import CONVENTION, Scaling
from attnzoo.cost.scaling_figures import drawings
from attnzoo.cost.scaling_headlines import headlines
from attnzoo.cost.table import Column, Table
from attnzoo.report.export import inline_svg
from attnzoo.report.figures import Drawing
from attnzoo.report.page import STYLE

TITLE = "What an attention costs"
SOURCE = "https://mbrenndoerfer.com/writing/attention-complexity-quadratic-scaling-memory-efficient-transformers"
ARTICLE_FIGURES = ("pairs", "contours", "flops", "memory", "rnn", "time", "shares")


def page(scaling: Scaling) -> str:
    """The whole page, deterministic in `scaling`."""
    settings = scaling.settings
    lead = f"{settings.model.title} on {settings.gpu.title}, {settings.length:,} tokens, {len(scaling.variants)} variants of the zoo. {CONVENTION}"
    body = "\n".join([*_extension(scaling), *_article(scaling)])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n<p>{escape(lead)}</p>\n{body}\n</body>\n</html>\n"
    )


def _extension(scaling: Scaling) -> Iterator[str]:
    yield "<section>\n<h2>A model, a GPU, and every variant</h2>"
    yield f"<ul>{html_items(headlines(scaling))}</ul>"
    if scaling.remarks:
        yield f'<ul class="notes">{html_items(scaling.remarks)}</ul>'
    for drawing in drawings(scaling):
        if drawing.name not in ARTICLE_FIGURES:
            yield html_figure(drawing)
    for table in scaling.extension:
        yield html_table(table)
    yield "</section>"


def _article(scaling: Scaling) -> Iterator[str]:
    yield "<section>\n<h2>The article, exact</h2>"
    yield f'<p>The tables of M. Brenndoerfer, <a href="{SOURCE}">Attention Complexity</a> (2025), each computed from its formula.</p>'
    yield "<h3>Where its prose and its tables part, the tables are right</h3>"
    yield f"<ul>{html_items(f'“{found.prose}”: {found.table}' for found in scaling.contradictions)}</ul>"
    for drawing in drawings(scaling):
        if drawing.name in ARTICLE_FIGURES:
            yield html_figure(drawing)
    for table in scaling.article:
        yield html_table(table)
    yield "</section>"


def html_figure(drawing: Drawing) -> str:
    """A figure's heading, caption and panels."""
    several = len(drawing.parts) > 1
    panels = "\n".join(
        inline_svg(part, f"{drawing.name}-{index}", f"{drawing.title}, panel {index}" if several else drawing.title)
        for index, part in enumerate(drawing.parts, 1)
    )
    heading = f"<h3>{escape(drawing.title)}</h3>\n<figcaption>{escape(drawing.caption)}</figcaption>"
    return f'<figure>\n{heading}\n<div class="panels">{panels}</div>\n</figure>'


def html_table(table: Table) -> str:
    """A table's heading, formula, numbers and notes."""
    parameters = "; ".join(
        f"{name} = {value:,g}" if isinstance(value, int | float) else f"{name} = {value}" for name, value in table.parameters.items()
    )
    formula = escape(table.formula + (f"; {parameters}" if parameters else ""))
    head = "".join(f'<th scope="col"{_aligned(table, column)}>{escape(column.heading)}</th>' for column in table.columns)
    body = "\n".join("<tr>" + "".join(map(_cell, table.columns, row, _first(table))) + "</tr>" for row in table.cells())
    notes = f'\n<ul class="notes">{html_items(table.notes)}</ul>' if table.notes else ""
    return (
        f'<h3>{escape(table.title)}</h3>\n<p class="soft">{formula}</p>\n<div class="scroll" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>{notes}"
    )


def _first(table: Table) -> Iterator[str]:
    """The kind of each column's cells: a row's heading first, then text or numbers."""
    for index, column in enumerate(table.columns):
        yield "heading" if index == 0 else "text" if column.words else "number"


def _cell(column: Column, text: str, kind: str) -> str:
    text = "–" if text == "-" else escape(re.sub(r"(?<=\d)x$", "×", text.replace(" us", " µs")))
    if kind == "heading":
        return f'<th scope="row" class="text">{text}</th>'
    return f'<td class="text">{text}</td>' if kind == "text" else f"<td>{text}</td>"


def _aligned(table: Table, column: Column) -> str:
    return ' class="text"' if column is table.columns[0] or column.words else ""


def html_items(texts: Iterable[str]) -> str:
    """The items of a list, escaped."""
    return "".join(f"<li>{escape(text)}</li>" for text in texts)
