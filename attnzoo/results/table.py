"""A table of numbers that knows how to print itself: as text, as HTML, as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
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

    def __str__(self) -> str:
        """Title, rows in aligned columns, and notes, as plain text."""
        lines = [[column.heading for column in self.columns], *self.cells()]
        widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
        left = [column.words for column in self.columns]
        told = [
            "  ".join(
                text.ljust(width) if words else text.rjust(width)
                for text, width, words in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *told, *(f"- {note}" for note in self.notes)])

    def to_html(self) -> str:
        """Heading, formula, numbers and notes."""
        parameters = "; ".join(
            f"{name} = {value:,g}" if isinstance(value, int | float) else f"{name} = {value}"
            for name, value in self.parameters.items()
        )
        formula = escape(self.formula + (f"; {parameters}" if parameters else ""))
        kinds = [
            "heading" if index == 0 else "text" if column.words else "number"
            for index, column in enumerate(self.columns)
        ]
        head = "".join(
            f'<th scope="col"{"" if kind == "number" else _TEXT}>{escape(column.heading)}</th>'
            for column, kind in zip(self.columns, kinds, strict=True)
        )
        body = "\n".join(
            "<tr>" + "".join(map(_html_cell, row, kinds)) + "</tr>" for row in self.cells()
        )
        notes = f'\n<ul class="notes">{html_items(self.notes)}</ul>' if self.notes else ""
        return (
            f'<h3>{escape(self.title)}</h3>\n<p class="soft">{formula}</p>\n<div class="scroll" '
            'tabindex="0">\n<table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>{notes}"
        )

    def _repr_html_(self) -> str:
        return self.to_html()


_TEXT = ' class="text"'


def _html_cell(text: str, kind: str) -> str:
    text = "–" if text == "-" else escape(re.sub(r"(?<=\d)x$", "×", text.replace(" us", " µs")))
    if kind == "heading":
        return f'<th scope="row"{_TEXT}>{text}</th>'
    return f"<td{_TEXT}>{text}</td>" if kind == "text" else f"<td>{text}</td>"


def html_items(texts: Iterable[str]) -> str:
    """The items of a list, escaped."""
    return "".join(f"<li>{escape(text)}</li>" for text in texts)
