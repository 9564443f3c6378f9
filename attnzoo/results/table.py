"""A table of numbers that knows how to print itself: as text cells, as CSV, as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column.

    key: of its values in the rows.
    heading: names the quantity and its unit.
    format: writes its numbers, a format specification or a function.
    words: it holds text, aligned left.
    """

    key: str
    heading: str
    format: str | Callable[[Any], str] = ","
    words: bool = False

    def text(self, value: Any) -> str:
        """The value as a reader sees it; None is a dash."""
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        return format(value, self.format) if isinstance(self.format, str) else self.format(value)


@dataclass(frozen=True)
class Table:
    """Rows of exact values under columns.

    name: of its files.
    title: above it.
    formula: what is computed.
    parameters: the sizes it is computed at.
    notes: how to read it.
    """

    name: str
    title: str
    formula: str
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """Every row as the strings a reader sees, in the order of the columns."""
        return [[column.text(row[column.key]) for column in self.columns] for row in self.rows]

    def values(self, key: str) -> list[Any]:
        """One column's exact values."""
        return [row[key] for row in self.rows]

    def to_csv(self) -> str:
        """The exact values under the columns' keys; an empty field where there is no number."""
        text = io.StringIO()
        writer = csv.DictWriter(
            text,
            [column.key for column in self.columns],
            extrasaction="ignore",
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()
