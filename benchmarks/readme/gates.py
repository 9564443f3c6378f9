"""The tables of gates and delta rules: their times beside exact attention, and the layers of
transformers that they stand in for."""

from __future__ import annotations

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import Table, markdown_table

PHASES = ("forward", "forward+backward")
LENGTH = 4096


def speeds() -> str:
    """Times of 4,096 tokens, and how much of the saved MACs is kept as speed."""
    rows: dict[str, dict[str, Row]] = {}
    for row in read_lines("gates.jsonl"):
        if row["length"] == LENGTH and row["segments"] == 1 and row["phase"] in PHASES:
            rows.setdefault(row["variant"], {})[row["phase"]] = row
    headings = [""]
    for phase in PHASES:
        headings += [phase, "measured speed-up", "of the MAC speed-up", "of the GEMM rate"]
    lines = []
    for variant, by_phase in rows.items():
        cells = ["exact, SDPA" if variant == "sdpa" else f"`{variant}`"]
        for phase in PHASES:
            row = by_phase[phase]
            cells += [
                f"{row['seconds'] * 1e3:.1f} ms",
                f"{row['sdpa_seconds'] / row['seconds']:.2f}×",
                f"{row['kept_speedup']:.0%}",
                f"{row['flops_per_second'] / row['peak_flops']:.0%}",
            ]
        lines.append(cells)
    return markdown_table(headings, lines)


WHO = {"attnzoo": "in Python", "compiled": "`native`"}


def fallbacks() -> str:
    """transformers' torch path and this engine in its place, milliseconds and MiB."""
    rows = {
        (row["what"], row["name"], row["phase"], row["who"]): row
        for row in read_lines("fallbacks.jsonl")
    }
    lines = []
    for what, name, phase, who in rows:
        if who not in WHO:
            continue
        ours, theirs = (rows[what, name, phase, one] for one in (who, "transformers"))
        alone = rows.get((what, name, phase, "projections"))
        lines.append(
            [
                f"{name}, {what}",
                phase,
                f"{theirs['seconds'] * 1e3:,.1f} ms",
                WHO[who],
                f"{ours['seconds'] * 1e3:,.1f} ms",
                f"{theirs['seconds'] / ours['seconds']:.1f}×",
                "" if alone is None else f"{alone['seconds'] * 1e3:,.1f} ms",
                f"{theirs['peak_bytes'] / 2**20:,.0f} MiB",
                f"{ours['peak_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    headings = [
        "",
        "",
        "transformers",
        "attnzoo's backend",
        "attnzoo",
        "times as fast",
        "projections alone",
    ]
    return markdown_table([*headings, "peak, transformers", "attnzoo"], lines)


TABLES: dict[str, Table] = {"gates": speeds, "fallbacks": fallbacks}
