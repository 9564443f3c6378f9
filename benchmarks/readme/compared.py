"""compare.json as the tables at the top of the README: error, cost and time of every variant on
real queries and keys."""

from __future__ import annotations

import json
import re

from attnzoo.results.units import count, memory
from benchmarks.readme.files import RESULTS, Row
from benchmarks.readme.regions import markdown_table

HEADINGS = [
    "variant",
    "output error",
    "total variation",
    "top-16 mass kept",
    "MACs",
    "MAC speed-up",
    "measured speed-up",
    "their ratio",
    "peak memory",
]
ROUNDING = 1e-4  # below it an error is float32's


def compare(model: str) -> str:
    """The rows of one model, under the error of answering the average of the values."""
    rows = [
        row
        for row in json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))["rows"]
        if row["model"] == model
    ]
    first = rows[0]
    kind = "causal" if first["is_causal"] else "bidirectional"
    baseline = (
        f"baseline: answering the average of the values errs by {first['mean_value_error']:.3f}"
    )
    heading = f"**{model} on Shakespeare, {kind}, {first['length']:,} tokens** ({baseline})"
    return f"{heading}\n\n{markdown_table(HEADINGS, [_cells(row) for row in rows])}"


TABLES = {"compare": compare}


def _cells(row: Row) -> list[str]:
    name = f"`{row['variant']}`"
    if row["output_error"] is None:
        return [name, _why_not(row), *[""] * (len(HEADINGS) - 2)]
    lost = " ✗" if row["output_error"] > row["mean_value_error"] else ""
    return [
        name,
        _error(row["output_error"]) + lost,
        _error(row["total_variation"]),
        f"{row['top_mass_kept']:.0%}",
        count(row["macs"]),
        f"{row['promised_speedup']:.2f}×",
        f"{row['speedup']:.2f}×",
        f"{row['speedup'] / row['promised_speedup']:.0%}",
        memory(row["peak_bytes"]),
    ]


def _error(value: float) -> str:
    return "0" if value < ROUNDING else f"{value:.3f}"


def _why_not(row: Row) -> str:
    """The first clause of the note, without the variant's name."""
    return re.split(r"[:;,]", row["note"].removeprefix(row["variant"]).strip())[0]
