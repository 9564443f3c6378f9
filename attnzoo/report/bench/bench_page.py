"""A benchmark as one HTML page that needs nothing else: crossovers, figures, every number, and
where it ran."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.benchmarking.bench_rows import Row
from attnzoo.report.bench.bench_figures import drawings
from attnzoo.report.bench.bench_tables import crossover_table, setting_tables, whole_table
from attnzoo.report.document import joined, results_document
from attnzoo.report.result import Result

TITLE = "How fast attention variants are"
LEAD = (
    "Every attention is checked against its reference before it gets a time, and takes turns with "
    "exact SDPA, called directly. "
    "The limit is the least time that its arithmetic and its traffic allow at the rate of matrix "
    "products and the bandwidth measured in the same run."
)


def bench_result(rows: Sequence[Row], interrupted: str = "") -> Result:
    """Rows with their tables, figures and page; the first table holds all of them."""
    settings = setting_tables(rows)
    return Result(
        "bench",
        tuple(rows),
        (whole_table(rows), *(settings if len(settings) > 1 else ()), crossover_table(rows)),
        lambda: drawings(rows),
        lambda: page(rows),
        interrupted=interrupted,
    )


def page(rows: Sequence[Row]) -> str:
    """The whole page, deterministic in `rows`."""
    return results_document(
        TITLE,
        LEAD,
        crossover_table(rows).to_html(),
        drawings(rows),
        setting_tables(rows),
        joined(map(_facts, rows)),
    )


def _facts(row: Row) -> dict[str, str]:
    """The row's environment, and the limits that were measured beside it."""
    limits = {}
    if row.peak_flops and row.bandwidth:
        limits["measured peak"] = f"{row.peak_flops / 1e9:,.0f} GFLOP/s in {row.dtype}"
        limits["measured bandwidth"] = f"{row.bandwidth / 1e9:,.1f} GB/s"
    return (row.environment or {}) | limits
