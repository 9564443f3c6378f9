"""When and where the rows of result files were recorded, as the table at the head of a page."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.readme import files
from benchmarks.readme.files import Row
from benchmarks.readme.regions import markdown_table

HEADINGS = ["file in `benchmarks/results`", "recorded", "processor", "threads", "torch"]


def recorded(*patterns: str) -> str:
    """A row for each file that a pattern names: the days, processors and versions of its rows.

    patterns: paths below benchmarks/results, in which * stands for any part of a name
    Raises ValueError where a pattern names no file, and where a row does not say its environment.
    """
    lines = []
    for pattern in patterns:
        paths = sorted(files.RESULTS.glob(pattern))
        if not paths:
            raise ValueError(f"no file of benchmarks/results is called {pattern!r}")
        lines += [_line(path) for path in paths]
    return markdown_table(HEADINGS, lines)


TABLES = {"recorded": recorded}


def _line(path: Path) -> list[str]:
    environments = [_environment(row, path) for row in _rows(path)]
    days = sorted({one["date"][:10] for one in environments})
    name = f"`{path.relative_to(files.RESULTS).as_posix()}`"
    return [
        name,
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        *(_told(environments, key) for key in ("cpu", "threads", "torch")),
    ]


def _rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    return (
        [json.loads(text)] if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    )


def _environment(row: Row, path: Path) -> Row:
    if "environment" not in row:
        raise ValueError(f"a row of {path.name} does not say its environment")
    return row["environment"]


def _told(environments: list[Row], key: str) -> str:
    """Every value of a key in order of appearance, as words."""
    values = dict.fromkeys(str(one.get(key, "not recorded")) for one in environments)
    return ", ".join(value.replace("(R)", "") for value in values)
