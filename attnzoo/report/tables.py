"""A comparison on the screen, in rich: one table per model and length, and the sentences that follow from it."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnzoo.fidelity.rows import Comparison, Row
from attnzoo.report.columns import COLUMNS, Column, group_title, grouped, lost
from attnzoo.report.headlines import headlines


def comparison_view(comparison: Comparison) -> RenderableType:
    """Everything a reader needs on the screen: tables, notes, what they say, what the columns mean, and where it ran."""
    said = headlines(comparison)
    parts: list[RenderableType] = []
    for group, rows in grouped(comparison.rows).items():
        title = group_title(group)
        parts += [Text(title, style="bold"), _samples_line(comparison, rows[0]), rows_table(rows), *_notes(rows)]
        parts += [Text(f"- {sentence}") for sentence in said[title]]
        parts.append(Text())
    return Group(*parts, *_meanings(), Text(), environment_line(comparison))


def rows_table(rows: list[Row]) -> Table:
    """The rows of one model and length."""
    table = plain_table()
    for column in COLUMNS:
        table.add_column(column.heading, justify="right" if column.numeric else "left", overflow="fold", no_wrap=column.numeric)
    for row in rows:
        table.add_row(*(_cell(column, row) for column in COLUMNS))
    return table


def plain_table() -> Table:
    """A table of this library: rules above and below the headings only, nothing that needs colour or a wide font."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold", safe_box=True)


def environment_line(comparison: Comparison) -> Text:
    told = "; ".join(f"{key} {value}" for key, value in comparison.environment.items())
    return Text(told, style="dim")


def _cell(column: Column, row: Row) -> Text:
    text = column.text(row)
    if column.heading == "error" and row.output_error is not None:
        return Text(text, style="bold red" if lost(row) else "green")
    return Text(text, style="bold" if column.heading == "variant" else "")


def _samples_line(comparison: Comparison, row: Row) -> Text:
    for sample in comparison.samples:
        if (sample["model"], sample["is_causal"], sample["length"]) == (row.model, row.is_causal, row.length):
            return Text(describe_sample(sample), style="dim")
    return Text()


def describe_sample(sample: dict) -> str:
    """Which queries and keys a table is about: "layers 3, 12; heads 0, 4; score std 2.31; text ..."."""
    text = f"; {sample['text']}" if sample.get("text") else ""
    return f"{', '.join(sample['layers'])}; heads {', '.join(map(str, sample['heads']))}; score standard deviation {sample['score_std']:.2f}{text}"


def _notes(rows: list[Row]) -> list[RenderableType]:
    return [Padding(Text.from_markup(f"[bold]{escape(row.label)}[/]: {escape(row.note)}"), (0, 0, 0, 2)) for row in rows if row.note]


def _meanings() -> list[Text]:
    return [Text.assemble((column.heading, "bold"), ": ", column.meaning, style="dim") for column in COLUMNS[1:]]
