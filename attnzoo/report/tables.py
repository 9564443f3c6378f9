"""A comparison on the screen, in rich: one table per model and length, and the sentences that
follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from attnzoo.fidelity.comparison_rows import Comparison, Row
from attnzoo.report.comparison_columns import (
    BASELINE,
    COLUMNS,
    Column,
    folded,
    group_of,
    group_title,
    grouped,
    lost,
    notes,
)
from attnzoo.report.headlines import headlines
from attnzoo.report.plain_table import plain_table
from attnzoo.results.table import Table as NumberTable

if TYPE_CHECKING:
    from attnzoo.results.table import Table as NumberTable

LEGEND = (
    "error: relative output error; baseline: the same for answering the average of the values; ! "
    "marks who lost to it. TV: total variation of A's rows from softmax's. MAC speed-up, "
    "measured speed-up: over exact attention, by multiply-accumulates and by the clock."
)
QUALITY = ("error", BASELINE, "TV", "top-16 kept")


def comparison_view(comparison: Comparison) -> RenderableType:
    """Everything a reader needs on the screen: tables, notes, what they say, what the columns mean,
    and where it ran."""
    said = headlines(comparison)
    parts: list[RenderableType] = []
    for group, rows in grouped(comparison.rows).items():
        title = group_title(group)
        parts += [
            Text(title, style="bold"),
            _sample_line(comparison, rows[0]),
            Text(),
            RowsTable(rows),
            Text(),
            *_notes(rows),
        ]
        parts += [_bullet(Text(sentence)) for sentence in said[title]]
        parts.append(Text())
    return Group(*parts, Text(LEGEND, style="dim"), Text(), environment_line(comparison))


@dataclass(frozen=True)
class RowsTable:
    """The rows of one model and length, as one table where the terminal is wide enough for all
    numbers, else as several."""

    rows: list[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(self._parts(COLUMNS[1:], options.max_width)):
            if number:
                yield Text()
            yield self._table((COLUMNS[0], *columns), options.max_width)

    def _parts(self, columns: tuple[Column, ...], width: int) -> list[tuple[Column, ...]]:
        """The columns, parted where quality ends and cost begins, then in halves, until every part
        fits."""
        if len(columns) == 1 or self._gap((COLUMNS[0], *columns), width):
            return [columns]
        quality = sum(column.heading in QUALITY for column in columns)
        cut = quality if 0 < quality < len(columns) else len(columns) // 2
        return self._parts(columns[:cut], width) + self._parts(columns[cut:], width)

    def _gap(self, columns: tuple[Column, ...], width: int) -> int:
        """The most spaces between columns, up to 3, that leave room for whole labels, or else for
        folded ones; 0 when there is no room."""
        whole = max(len(row.label) for row in self.rows)
        folds = max(len(line) for row in self.rows for line in folded(row.label, 0).split("\n"))
        return next(
            (
                gap
                for least in (whole, folds)
                for gap in (3, 2, 1)
                if self._label_room(columns, width, gap) >= least
            ),
            0,
        )

    def _table(self, columns: tuple[Column, ...], width: int) -> Table:
        gap = self._gap(columns, width) or 1
        table = plain_table(gap)
        room = self._label_room(columns, width, gap)
        for column in columns:
            table.add_column(
                _heading(column), justify="right" if column.numeric else "left", no_wrap=True
            )
        for row in self.rows:
            table.add_row(
                Text(folded(row.label, room), style="bold"),
                *(_cell(column, row) for column in columns[1:]),
            )
        return table

    def _label_room(self, columns: tuple[Column, ...], width: int, gap: int) -> int:
        """Characters left for the first column."""
        headed = [
            [*_heading(column).split("\n"), *(column.text(row) for row in self.rows)]
            for column in columns[1:]
        ]
        return width - sum(max(map(len, texts)) + gap for texts in headed)


def rich_table(table: NumberTable) -> Table:
    """A table of numbers that knows how to print itself, on the screen."""
    drawn = plain_table()
    for column in table.columns:
        drawn.add_column(
            column.heading, justify="left" if column.words else "right", overflow="fold"
        )
    for cells in table.cells():
        drawn.add_row(*cells)
    return drawn


def environment_line(comparison: Comparison) -> Text:
    """Seed, versions and machine in one line."""
    told = "; ".join(f"{key} {value}" for key, value in comparison.environment.items())
    return Text(told, style="dim")


def _cell(column: Column, row: Row) -> Text:
    judged = column.heading == "error" and row.output_error is not None
    return Text(column.text(row), style=("bold red" if lost(row) else "green") if judged else "")


def _heading(column: Column) -> str:
    return column.heading.replace(" ", "\n")


def _sample_line(comparison: Comparison, row: Row) -> Text:
    sample = sample_of(comparison, row)
    return Text("" if sample is None else describe_sample(sample), style="dim")


def sample_of(comparison: Comparison, row: Row) -> dict[str, Any] | None:
    """The summary of the sample that a row was measured on."""
    for sample in comparison.samples:
        if (sample["model"], sample["is_causal"], sample["length"]) == group_of(row):
            return sample
    return None


def describe_sample(sample: dict[str, Any]) -> str:
    """Which queries and keys a table is about: "layers 3, 12; heads 0, 4; score standard deviation
    2.31; text"."""
    layers = ", ".join(sample["layers"])
    if all(layer.startswith("layer ") for layer in sample["layers"]):
        layers = (
            f"{'layer' if len(sample['layers']) == 1 else 'layers'} {layers.replace('layer ', '')}"
        )
    heads = ", ".join(map(str, sample["heads"]))
    text = f"; {sample['text']}" if sample.get("text") else ""
    return f"{layers}; heads {heads}; score standard deviation {sample['score_std']:.2f}{text}"


def _notes(rows: list[Row]) -> list[RenderableType]:
    return [
        _bullet(Text.assemble((labels, "bold"), ": ", note)) for note, labels in notes(rows).items()
    ]


def _bullet(text: Text) -> Table:
    """A list item whose second line starts under its first word."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=1)
    grid.add_column()
    grid.add_row("-", text)
    return grid
