"""The scaling tables and figures as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from attnzoo.report.document import document, html_figure, html_items, html_table
from attnzoo.report.scaling.scaling_figures import drawings
from attnzoo.report.scaling.scaling_headlines import headlines
from attnzoo.report.scaling.scaling_report import CONVENTION, Scaling

TITLE = "What an attention costs"
SOURCE = "https://mbrenndoerfer.com/writing/attention-complexity-quadratic-scaling-memory-efficient-transformers"
ARTICLE_FIGURES = ("pairs", "contours", "flops", "memory", "rnn", "time", "shares")


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
        yield html_table(table)
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
        yield html_table(table)
    yield "</section>"
