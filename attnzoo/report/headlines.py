"""What a comparison says, in sentences computed from its rows."""

from __future__ import annotations

from attnzoo.fidelity.comparison_rows import Comparison, Row
from attnzoo.report.comparison_columns import (
    group_title,
    grouped,
    is_exact,
    is_reference,
    kept,
    lost,
)
from attnzoo.results.units import number, percent, ratio


def headlines(comparison: Comparison) -> dict[str, list[str]]:
    """For every model and length, by title: who lost to the average of the values, who came closest
    at fewer MACs, who was fastest."""
    return {
        group_title(group): [*_indistinct(rows), *_losers(rows), *_closest(rows), *_fastest(rows)]
        for group, rows in grouped(comparison.rows).items()
    }


def _approximate(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.output_error is not None and not is_exact(row)]


def _indistinct(rows: list[Row]) -> list[str]:
    """Variants that are approximations in general and exact here, such as a window as long as the
    text."""
    labels = [row.label for row in rows if is_exact(row) and not is_reference(row)]
    return (
        [f"Exact at this length, where nothing is left out: {', '.join(labels)}."] if labels else []
    )


def _losers(rows: list[Row]) -> list[str]:
    judged = [row for row in _approximate(rows) if row.mean_value_error is not None]
    losers = sorted((row for row in judged if lost(row)), key=lambda row: row.output_error or 0.0)
    if not judged:
        return []
    if not losers:
        who = (
            f"All {len(judged)} approximations come"
            if len(judged) > 1
            else "The one approximation comes"
        )
        return [f"{who} closer to exact attention than the average of the values does."]
    told = ", ".join(
        f"{row.label} (error {number(row.output_error)}, baseline {number(row.mean_value_error)})"
        for row in losers
    )
    return [
        f"{len(losers)} of {len(judged)} approximations lost to the baseline, the average of the "
        f"values: {told}."
    ]


def _closest(rows: list[Row]) -> list[str]:
    cheaper = [
        row
        for row in _approximate(rows)
        if row.macs is not None and row.exact_macs and row.macs < row.exact_macs
    ]
    if not cheaper:
        return []
    best = min(cheaper, key=lambda row: row.output_error or 0.0)
    assert best.macs is not None and best.exact_macs is not None
    verdict = ", and even it lost to the baseline" if lost(best) else ""
    return [
        f"Closest to exact attention with fewer MACs: {best.label}, error "
        f"{number(best.output_error)}"
        f" with {percent(best.macs / best.exact_macs)} of the MACs{verdict}."
    ]


def _fastest(rows: list[Row]) -> list[str]:
    timed = [row for row in _approximate(rows) if row.speedup is not None]
    if not timed:
        return []
    best = max(timed, key=lambda row: row.speedup or 0.0)
    promise = (
        ""
        if best.promised_speedup is None
        else f", {percent(kept(best))} of the {ratio(best.promised_speedup)} that its MACs promise"
    )
    if best.speedup is not None and best.speedup < 1:
        return [
            f"No approximation was faster than exact attention; the fastest, {best.label}, ran at "
            f"{ratio(best.speedup)} its speed{promise}."
        ]
    return [f"Fastest: {best.label}, {ratio(best.speedup)} the speed of exact attention{promise}."]
