"""Training results as one HTML page that needs nothing else: which attention for which task, figures, every number, and where it ran."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attnzoo.cost.scaling_page import html_figure, html_table
from attnzoo.report.page import STYLE
from attnzoo.report.train_figures import drawings
from attnzoo.report.train_tables import matrix, problem_tables
from attnzoo.tasks.rows import Row
from attnzoo.tasks.summary import summed_up

TITLE = "What attention variants learn"
LEAD = (
    "One small pre-norm transformer, trained on each task with one attention after another: the same weights to start from, the same examples in the "
    "same order, the same number of steps. Every learning rate is tried with the first seed; the best on validation is taken for the others, and the "
    "test score is the mean over all of them."
)


def page(rows: Sequence[Row]) -> str:
    """The whole page, deterministic in `rows`."""
    problems = summed_up(rows)
    figures = "\n".join(html_figure(drawing) for drawing in drawings(problems))
    tables = "\n".join(html_table(table) for table in problem_tables(problems))
    facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in provenance(rows).items())
    body = (
        f"<section>\n{html_table(matrix(problems))}\n</section>\n<section>\n<h2>Figures</h2>\n{figures}\n</section>\n"
        f"<section>\n<h2>Every number</h2>\n{tables}\n</section>\n<section>\n<h2>Where it ran</h2>\n<dl>\n{facts}\n</dl>\n</section>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n<p>{LEAD}</p>\n{body}\n</body>\n</html>\n"
    )


def provenance(rows: Sequence[Row]) -> dict[str, str]:
    """The environments of the rows, each fact with all its values."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, text in (row.environment or {}).items():
            if text not in found.setdefault(name, []):
                found[name].append(text)
    return {name: "; ".join(texts) for name, texts in found.items()}
