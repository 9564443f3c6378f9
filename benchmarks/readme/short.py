"""The table of short inputs: each attention beside the faster of SDPA and of SDPA with a mask."""

from __future__ import annotations

import statistics

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import Table, markdown_table

PHASES = ("forward", "forward+backward")


def short_inputs() -> str:
    """Median and largest ratio over causal or not, padded or not."""
    found: dict[tuple[str, int], dict[int, list[Row]]] = {}
    for row in read_lines("short_inputs.jsonl"):
        by_length = found.setdefault((row["variant"], row["batch_size"]), {})
        by_length.setdefault(row["length"], []).append(row)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    headings = ["attention", "batch", *(f"{length:,}" for length in lengths)]
    return markdown_table(
        headings,
        [
            [f"`{variant}`", str(batch), *(_cell(by_length.get(length)) for length in lengths)]
            for (variant, batch), by_length in found.items()
        ],
    )


def _cell(rows: list[Row] | None) -> str:
    """Such as "1.1 to 1.3 · 1.0 to 1.2": forward, and forward with backward."""
    if rows is None:
        return ""
    said = []
    for phase in PHASES:
        ratios = [row["over_faster"][0] for row in rows if row["phase"] == phase]
        said.append(f"{statistics.median(ratios):.2f} (to {max(ratios):.2f})")
    return "; ".join(said)


TABLES: dict[str, Table] = {"short": short_inputs}
