"""The columns of a comparison, once for the screen and the page: a heading, what it means, and how
a row's number is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnzoo.fidelity.comparison_rows import Row
from attnzoo.registry import names, spec_of
from attnzoo.results.table import Column as Cells
from attnzoo.results.table import Table
from attnzoo.results.units import ABSENT, count, duration, memory, number, percent, ratio

# An output error below this is rounding: the row is exact attention in another order of sums
EXACT_BELOW = 1e-4
BASELINE = "baseline: average of the values"


@dataclass(frozen=True)
class Column:
    """One column of a comparison.

    key: names its values in a table.
    heading: short words, each on a line of its own, so that twelve columns fit a terminal.
    meaning: one line for the reader.
    value: a row's exact number or words.
    format: writes a number in ASCII; None of a column of words.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[Row], Any]
    format: Callable[[Any], str] | None = None

    @property
    def numeric(self) -> bool:
        return self.format is not None

    def text(self, row: Row) -> str:
        """The cell of a row: a mark stands behind the error of a variant that lost."""
        value = self.value(row)
        told = (value or ABSENT) if self.format is None else self.format(value)
        return f"{told} !" if self.key == "output_error" and lost(row) else told


def lost(row: Row) -> bool:
    """Whether the variant came no closer to exact attention than the average of the values does."""
    return (
        row.output_error is not None
        and row.mean_value_error is not None
        and row.output_error >= row.mean_value_error
    )


def is_reference(row: Row) -> bool:
    """Whether the row is softmax attention itself, whose error is rounding in whatever dtype it
    ran."""
    return row.variant in names() and spec_of(row.variant).family == "exact"


def is_exact(row: Row) -> bool:
    """Whether the row's output is exact attention's up to rounding."""
    return row.output_error is not None and (is_reference(row) or row.output_error < EXACT_BELOW)


def kept(row: Row) -> float | None:
    """Measured speed-up divided by MAC speed-up."""
    return (
        None if not row.speedup or not row.promised_speedup else row.speedup / row.promised_speedup
    )


COLUMNS: tuple[Column, ...] = (
    Column(
        "variant",
        "variant",
        "the attention and the options it was given",
        lambda row: row.label,
    ),
    Column(
        "output_error",
        "error",
        "relative output error, |A v - exact| / |exact|; ! marks who lost to the baseline",
        lambda row: row.output_error,
        number,
    ),
    Column(
        "mean_value_error",
        BASELINE,
        "the same error for answering the average of the visible values",
        lambda row: row.mean_value_error,
        number,
    ),
    Column(
        "total_variation",
        "TV",
        "total variation: half the summed difference between a row of A and softmax's; 0: equal, "
        "1: disjoint, above 1: not a distribution",
        lambda row: row.total_variation,
        number,
    ),
    Column(
        "top_mass_kept",
        "top-16 kept",
        "share of the mass on softmax's 16 heaviest keys that the variant also puts there",
        lambda row: row.top_mass_kept,
        percent,
    ),
    Column(
        "macs",
        "MACs",
        "multiply-accumulates of one forward, by the closed form; one MAC is two FLOPs",
        lambda row: row.macs,
        count,
    ),
    Column(
        "promised_speedup",
        "MAC speed-up",
        "speed-up that the MACs promise: exact attention's, divided by the variant's",
        lambda row: row.promised_speedup,
        ratio,
    ),
    Column("seconds", "time", "median time of one forward", lambda row: row.seconds, duration),
    Column(
        "speedup",
        "measured speed-up",
        "speed-up by the clock: the time of exact attention (SDPA) in the same rounds, divided by "
        "the variant's",
        lambda row: row.speedup,
        ratio,
    ),
    Column(
        "kept",
        "their ratio",
        "measured speed-up divided by MAC speed-up: how much of the saved arithmetic became saved "
        "time",
        kept,
        percent,
    ),
    Column(
        "peak_bytes",
        "peak memory",
        "highest sum of allocations of one forward beyond its inputs",
        lambda row: row.peak_bytes,
        memory,
    ),
    Column("backend", "backend", "the implementation that ran", lambda row: row.backend),
)
#: What rows of several models and lengths have in front.
SAMPLE = (
    Cells("model", "model", words=True),
    Cells("form", "form", words=True),
    Cells("length", "n"),
)


def comparison_table(rows: Sequence[Row], name: str = "comparison") -> Table:
    """All rows as one table of exact values."""
    drawn = [Cells(c.key, c.heading, c.format or str, words=not c.numeric) for c in COLUMNS]
    values = tuple(
        {
            "model": row.model,
            "form": _form(row.is_causal),
            "length": row.length,
            **{column.key: column.value(row) for column in COLUMNS},
        }
        for row in rows
    )
    groups = grouped(rows)
    return Table(
        name,
        f"Against exact attention: {'; '.join(map(group_title, groups))}",
        "; ".join(f"{column.heading}: {column.meaning}" for column in COLUMNS[1:]),
        (drawn[0], *(SAMPLE if len(groups) > 1 else ()), *drawn[1:]),
        values,
        notes=tuple(f"{labels}: {note}" for note, labels in notes(rows).items()),
    )


Group = tuple[str, bool, int]


def group_of(row: Row) -> Group:
    """What rows must share to stand in one table: model, causality, length."""
    return row.model, row.is_causal, row.length


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by model, causality and length, each in order of appearance."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def group_title(group: Group) -> str:
    """Model, form and length: "SmolLM2-135M, causal, 4,096 tokens"."""
    model, is_causal, length = group
    return f"{model}, {_form(is_causal)}, {length:,} tokens"


def _form(is_causal: bool) -> str:
    return "causal" if is_causal else "bidirectional"


def notes(rows: Iterable[Row]) -> dict[str, str]:
    """Every note of the rows, with the labels it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            about.setdefault(row.note, []).append(row.label)
    return {note: ", ".join(labels) for note, labels in about.items()}


def folded(label: str, width: int) -> str:
    """A label such as "performer num_features=64 features=relu" on as many lines as `width`
    characters need, broken at its spaces."""
    lines: list[str] = []
    for word in label.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
