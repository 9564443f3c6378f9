"""The table of single steps of decoding."""

from __future__ import annotations

from benchmarks.readme.files import read_lines
from benchmarks.readme.regions import Table, markdown_table


def steps() -> str:
    """The time of a step of every variant, and its ratio to exact attention, the fastest first."""
    rows = sorted(read_lines("decoding.jsonl"), key=lambda row: row["over_exact"][0])
    lines = []
    for row in rows:
        ratio, (low, high) = row["over_exact"]
        time = f"{row['seconds'] * 1e3:.2f} ms"
        times = [time, f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        lines.append([f"`{row['variant']}`", f"`{row['backend']}`", *times])
    return markdown_table(["attention", "backend", "a step", "over exact attention's"], lines)


TABLES: dict[str, Table] = {"steps": steps}
