"""A benchmark as one HTML page that needs nothing else: crossovers, figures, every number, and where it ran."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attnzoo.bench.rows import Row
from attnzoo.cost.scaling_page import html_figure, html_table
from attnzoo.report.bench_figures import drawings
from attnzoo.report.bench_tables import crossover_table, setting_tables
from attnzoo.report.page import STYLE

TITLE = "How fast attention variants are"
LEAD = (
    "Every attention is checked against its reference before it gets a time, and takes turns with exact SDPA, called directly. "
    "The limit is the least time that its arithmetic and its traffic allow at the rate of matrix products and the bandwidth measured in the same run."
)


def page(rows: Sequence[Row]) -> str:
    """The whole page, deterministic in `rows`."""
    figures = "\n".join(html_figure(drawing) for drawing in drawings(rows))
    tables = "\n".join(html_table(table) for table in setting_tables(rows))
    facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in provenance(rows).items())
    body = (
        f"<section>\n{html_table(crossover_table(rows))}\n</section>\n<section>\n<h2>Figures</h2>\n{figures}\n</section>\n"
        f"<section>\n<h2>Every number</h2>\n{tables}\n</section>\n<section>\n<h2>Where it ran</h2>\n<dl>\n{facts}\n</dl>\n</section>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n<p>{LEAD}</p>\n{body}\n</body>\n</html>\n"
    )


def provenance(rows: Sequence[Row]) -> dict[str, str]:
    """The environments of the rows, each fact with all its values, and the measured limits."""
    found: dict[str, list[str]] = {}
    for row in rows:
        facts = dict(row.environment or {})
        if row.peak_flops and row.bandwidth:
            facts["measured peak"] = f"{row.peak_flops / 1e9:,.0f} GFLOP/s in {row.dtype}"
            facts["measured bandwidth"] = f"{row.bandwidth / 1e9:,.1f} GB/s"
        for name, text in facts.items():
            if text not in found.setdefault(name, []):
                found[name].append(text)
    return {name: "; ".join(texts) for name, texts in found.items()}
