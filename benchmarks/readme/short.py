"""The table of short inputs: each attention beside the faster of SDPA and of SDPA with a mask."""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import Table, markdown_table


def short_inputs(phase: str, file: str = "short_inputs.jsonl") -> str:
    """Median and largest ratio over causal or not, padded or not, of a phase."""
    found: dict[tuple[str, int], dict[int, list[Row]]] = {}
    for row in read_lines(file):
        by_length = found.setdefault((row["variant"], row["batch_size"]), {})
        by_length.setdefault(row["length"], []).append(row)
    lengths = sorted({length for by_length in found.values() for length in by_length})
    headings = ["attention", "batch", *(f"{length:,}" for length in lengths)]
    return markdown_table(
        headings,
        [
            [
                f"`{variant}`",
                str(batch),
                *(_cell(by_length.get(length), phase) for length in lengths),
            ]
            for (variant, batch), by_length in found.items()
        ],
    )


def _cell(rows: list[Row] | None, phase: str) -> str:
    """Such as "1.10, 1.32": the median and the largest."""
    if rows is None:
        return ""
    ratios = [row["over_faster"][0] for row in rows if row["phase"] == phase]
    return f"{statistics.median(ratios):.2f}, {max(ratios):.2f}"


TABLES: dict[str, Table] = {
    "short": short_inputs,
    "short_python": partial(short_inputs, file="short_inputs_python.jsonl"),
}
