"""The scaling tables and figures as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from attnzoo.report.document import document, html_figure
from attnzoo.report.result import Result
from attnzoo.report.scaling.scaling_figures import drawings
from attnzoo.report.scaling.scaling_headlines import headlines
from attnzoo.report.scaling.scaling_report import CONVENTION, Scaling
from attnzoo.results.table import html_items

TITLE = "What an attention costs"
SOURCE = "https://mbrenndoerfer.com/writing/attention-complexity-quadratic-scaling-memory-efficient-transformers"
ARTICLE_FIGURES = ("pairs", "contours", "flops", "memory", "rnn", "time", "shares")


def scaling_result(scaling: Scaling) -> Result:
    """The tables, those of every variant first, with figures, page, and files of all numbers."""
    first = scaling.table("variant_costs")
    return Result(
        "scaling",
        (),
        (first, *(table for table in scaling.tables if table is not first)),
        lambda: drawings(scaling),
        lambda: page(scaling),
        {
            "scaling.json": lambda: scaling.to_json() + "\n",
            **{f"scaling-{table.name}.csv": table.to_csv for table in scaling.tables},
        },
    )


def page(scaling: Scaling) -> str:
    """The whole page, deterministic in `scaling`."""
    settings = scaling.settings
    lead = (
        f"{settings.model.title} on {settings.gpu.title}, {settings.length:,} tokens, "
        f"{len(scaling.variants)} variants of the zoo. {CONVENTION}"
    )
    body = "\n".join([*_extension(scaling), *_article(scaling)])
    return document(TITLE, escape(lead), body)


def _extension(scaling: Scaling) -> Iterator[str]:
    yield "<section>\n<h2>A model, a GPU, and every variant</h2>"
    yield f"<ul>{html_items(headlines(scaling))}</ul>"
    if scaling.remarks:
        yield f'<ul class="notes">{html_items(scaling.remarks)}</ul>'
    for drawing in drawings(scaling):
        if drawing.name not in ARTICLE_FIGURES:
            yield html_figure(drawing)
    for table in scaling.extension:
        yield table.to_html()
    yield "</section>"


def _article(scaling: Scaling) -> Iterator[str]:
    yield "<section>\n<h2>The article, exact</h2>"
    yield (
        f'<p>The tables of M. Brenndoerfer, <a href="{SOURCE}">Attention Complexity</a> (2025), '
        "each computed from its formula.</p>"
    )
    yield "<h3>Where its prose and its tables part, the tables are right</h3>"
    contradictions = (f"“{found.prose}”: {found.table}" for found in scaling.contradictions)
    yield f"<ul>{html_items(contradictions)}</ul>"
    for drawing in drawings(scaling):
        if drawing.name in ARTICLE_FIGURES:
            yield html_figure(drawing)
    for table in scaling.article:
        yield table.to_html()
    yield "</section>"
