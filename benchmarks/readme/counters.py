"""What counters of operations say of the same attentions, as a part of their MACs."""

from __future__ import annotations

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import Table, markdown_table


def counters(*packages: str) -> str:
    """Rows of attentions, a column for each counter of these packages."""
    rows = [row for row in read_lines("counters.jsonl") if row["package"] in packages]
    names = list(dict.fromkeys(row["counter"] for row in rows))
    found = {(row["counter"], row["attention"]): row for row in rows}
    versions = {row["counter"]: row["version"] for row in rows}
    headings = ["", *names]
    lines = [
        [attention, *(_part(found[name, attention]) for name in names)]
        for attention in dict.fromkeys(row["attention"] for row in rows)
    ]
    days = sorted({row["date"] for row in rows})
    asked = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    of_versions = ", ".join(f"{name} {versions[name]}" for name in names)
    return f"{markdown_table(headings, lines)}\n\nAsked on {asked}: {of_versions}."


def _part(row: Row) -> str:
    """The number in MACs over the MACs of the products."""
    if "error" in row:
        return row["error"].split(":")[0]
    part = row["says"] / (2 if row["unit"] == "FLOPs" else 1) / row["macs"]
    return f"{round(part, 4):g}"


TABLES: dict[str, Table] = {"counters": counters}
