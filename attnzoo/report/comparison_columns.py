"""The columns of a comparison, once for the screen and the page: a heading, what it means, and how
a row's number is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnzoo.fidelity.comparison_rows import Row
from attnzoo.registry import names, spec_of
from attnzoo.results.units import ABSENT, count, duration, memory, number, percent, ratio

# An output error below this is rounding: the row is exact attention in another order of sums
EXACT_BELOW = 1e-4
BASELINE = "baseline: average of the values"


@dataclass(frozen=True)
class Column:
    """One column of a comparison.

    heading: short words, each on a line of its own, so that twelve columns fit a terminal.
    meaning: one line for the reader.
    text: the cell of a row, in ASCII.
    """

    heading: str
    meaning: str
    text: Callable[[Row], str]
    numeric: bool = True


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


def _error(row: Row) -> str:
    return number(row.output_error) + (" !" if lost(row) else "")


def _mean_value_error(row: Row) -> str:
    return number(row.mean_value_error)


def _total_variation(row: Row) -> str:
    return number(row.total_variation)


COLUMNS: tuple[Column, ...] = (
    Column(
        "variant",
        "the attention and the options it was given",
        lambda row: row.label,
        numeric=False,
    ),
    Column(
        "error",
        "relative output error, |A v - exact| / |exact|; ! marks who lost to the baseline",
        _error,
    ),
    Column(
        BASELINE,
        "the same error for answering the average of the visible values",
        _mean_value_error,
    ),
    Column(
        "TV",
        "total variation: half the summed difference between a row of A and softmax's; 0: equal, "
        "1: disjoint, above 1: not a distribution",
        _total_variation,
    ),
    Column(
        "top-16 kept",
        "share of the mass on softmax's 16 heaviest keys that the variant also puts there",
        lambda row: percent(row.top_mass_kept),
    ),
    Column(
        "MACs",
        "multiply-accumulates of one forward, by the closed form; one MAC is two FLOPs",
        lambda row: count(row.macs),
    ),
    Column(
        "MAC speed-up",
        "speed-up that the MACs promise: exact attention's, divided by the variant's",
        lambda row: ratio(row.promised_speedup),
    ),
    Column("time", "median time of one forward", lambda row: duration(row.seconds)),
    Column(
        "measured speed-up",
        "speed-up by the clock: the time of exact attention (SDPA) in the same rounds, divided by "
        "the variant's",
        lambda row: ratio(row.speedup),
    ),
    Column(
        "their ratio",
        "measured speed-up divided by MAC speed-up: how much of the saved arithmetic became saved "
        "time",
        lambda row: percent(kept(row)),
    ),
    Column(
        "peak memory",
        "highest sum of allocations of one forward beyond its inputs",
        lambda row: memory(row.peak_bytes),
    ),
    Column(
        "backend", "the implementation that ran", lambda row: row.backend or ABSENT, numeric=False
    ),
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
    return f"{model}, {'causal' if is_causal else 'bidirectional'}, {length:,} tokens"


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
