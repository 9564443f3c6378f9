"""The tables of the backend `native` beside the backends in Python and exact attention."""

from __future__ import annotations

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import Table, markdown_table

PHASES = ("forward", "forward+backward")
FILES = {"tiles": "native.jsonl", "recurrences": "native_recurrences.jsonl"}
#: What a cell says: the ratio's name in a row.
RATIOS = ("gain", "over_exact", "kept")


def compiled(ratio: str, kind: str = "tiles") -> str:
    """A ratio, forward and with the backward pass, for each variant and length."""
    if kind not in FILES:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(FILES)}")
    if ratio not in RATIOS:
        raise ValueError(f"ratio={ratio!r} is unknown; choose one of {', '.join(RATIOS)}")
    found: dict[tuple[str, bool], dict[int, dict[str, Row]]] = {}
    for row in read_lines(FILES[kind]):
        by_length = found.setdefault((row["variant"], row["is_causal"]), {})
        by_length.setdefault(row["length"], {})[row["phase"]] = row
    lengths = sorted({length for by_length in found.values() for length in by_length})
    return markdown_table(
        ["attention", "causal", *(f"{length:,}" for length in lengths)],
        [
            [
                f"`{variant}`",
                "yes" if is_causal else "no",
                *(_cell(by_length.get(length, {}), ratio) for length in lengths),
            ]
            for (variant, is_causal), by_length in found.items()
        ],
    )


def _cell(rows: dict[str, Row], ratio: str) -> str:
    """Such as "1.52, 1.84"."""
    return ", ".join(f"{rows[phase][ratio][0]:.2f}" for phase in PHASES if phase in rows)


TABLES: dict[str, Table] = {"compiled": compiled}
