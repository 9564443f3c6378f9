"""A file of benchmarks/peers as one table: the time of the fastest other implementation over ours,
and the speed-up that ours keeps."""

from __future__ import annotations

from functools import partial

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import markdown_table

OURS, SDPA = "attnzoo", "sdpa"
ELSE = "†"  # behind the time of what is off its own formula
# What ran, and whether it was causal.
PASSES = (
    ("forward", False),
    ("forward", True),
    ("forward+backward", False),
    ("forward+backward", True),
)
GROUPS = {
    "window": "window of 256",
    "bigbird": "BigBird",
    "linear": "linear, elu + 1",
    "efficient": "linear, softmax features",
    "performer": "Performer",
    "linformer": "Linformer",
    "nystrom": "Nyström, 256 landmarks",
    "exact": "exact",
}


def others(file: str, *lengths: str) -> str:
    """A row a mathematics, cells for these lengths; a ratio below 1, where the other is faster, in
    bold; † where it computes something else."""
    rows = [row for row in read_lines(f"{file}.jsonl") if str(row["length"]) in lengths]
    headings = [
        "mathematics",
        "fastest of the others",
        "forward",
        "causal",
        "forward+backward",
        "causal",
    ]
    return markdown_table(
        [*headings, "measured / MAC: forward, causal", "forward+backward, causal"],
        [_cells(group, rows) for group in GROUPS],
    )


TABLES = {file: partial(others, file) for file in ("peers", "peers-zen5")}


def _cells(group: str, rows: list[Row]) -> list[str]:
    """The names in the order in which they are first the fastest."""
    own = [row for row in rows if row["group"] == group]
    settings = [
        [row for row in own if (row["phase"], row["is_causal"]) == setting] for setting in PASSES
    ]
    fastest = [fastest_others(found) for found in settings]
    names = dict.fromkeys(
        _short(row["label"], group)
        for found in fastest
        for row in found.values()
        if row is not None
    )
    kept = [
        " / ".join(
            f"{row['kept_speedup']:.2f}" for row in _by_length(found) if row["package"] == OURS
        )
        for found in settings
    ]
    ratios = [" / ".join(_ratio(row) for row in found.values()) for found in fastest]
    return [
        GROUPS[group],
        ", ".join(names),
        *ratios,
        *(", ".join(part for part in pair if part) for pair in (kept[:2], kept[2:])),
    ]


def fastest_others(rows: list[Row]) -> dict[int, Row | None]:
    """By length the row of another library with the least time; None where none has one."""
    found: dict[int, Row | None] = {row["length"]: None for row in _by_length(rows)}
    for row in rows:
        best = found[row["length"]]
        if (
            row["package"] != OURS
            and row["variant"] != SDPA
            and row["seconds"]
            and (best is None or _times(row) < _times(best))
        ):
            found[row["length"]] = row
    return found


def _by_length(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["length"])


def _times(row: Row) -> float:
    return row["seconds"] / row["ours_seconds"] if row["ours_seconds"] else float("inf")


def _ratio(row: Row | None) -> str:
    if row is None:
        return "none"
    text = (f"{_times(row):.2f}" if _times(row) < 10 else f"{_times(row):.0f}") + (
        ELSE if row["fault"] else ""
    )
    return f"**{text}**" if _times(row) < 1 else text


def _short(label: str, group: str) -> str:
    """The label without the group's name, which stands beside it."""
    return label.removesuffix(f" {group}")
