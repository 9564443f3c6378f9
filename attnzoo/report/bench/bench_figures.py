"""Figures of a benchmark, against length and a panel a setting: time, memory, measured over MAC
speed-up, fraction of the limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from attnzoo.benchmarking.bench_rows import SDPA, Row
from attnzoo.benchmarking.plan import in_pieces
from attnzoo.report.axes import log_axis
from attnzoo.report.figures import Drawing, Look, chart, plot, ratio_tick
from attnzoo.report.style import INK, styles
from attnzoo.results.units import count, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Number = Callable[[Row], float | None]


def drawings(rows: Iterable[Row]) -> list[Drawing]:
    """The figures that the rows have numbers for."""
    rows = list(rows)
    look = styles((row.variant, row.contender) for row in rows if row.variant != SDPA)
    charts = [
        _against_length(
            "time",
            "Time against length",
            "Median of one pass; bars: quartiles. Dashed: exact SDPA, called directly, in the same "
            "rounds. "
            "Over each panel: dtype, and batch × heads × head_dim.",
            rows,
            look,
            lambda row: row.seconds,
            "time of one pass",
            _time_tick,
        ),
        _against_length(
            "memory",
            "Memory against length",
            "Highest sum of allocations during one pass, beyond its inputs. Dashed: exact SDPA.",
            rows,
            look,
            lambda row: row.peak_bytes,
            "peak memory of one pass",
            memory_tick,
        ),
        _against_length(
            "kept",
            "Measured over MAC speed-up, against length",
            "Speed-up over exact SDPA in the same rounds, divided by the speed-up that the MACs "
            "promise. At 1 every saved MAC is saved time.",
            rows,
            look,
            lambda row: row.kept_speedup,
            "measured / MAC speed-up",
            ratio_tick,
        ),
        _against_length(
            "limit",
            "Fraction of the limit against length",
            "Least time by the measured rate of matrix products and the measured bandwidth, "
            "divided by the time taken. "
            "Above 1 the data stayed in a cache, which is faster than the memory, or the machine "
            "ran faster than when its limit was measured. "
            "Dashed: exact SDPA.",
            rows,
            look,
            lambda row: row.limit_share,
            "fraction of the limit",
            lambda value: f"{value:.3g}",
        ),
    ]
    return [drawing for drawing in charts if drawing is not None]


def panel_title(row: Row) -> str:
    """A setting in words, on two lines: "core forward, causal", "float32, 1×8×64" (batch × heads ×
    head_dim)."""
    causality = "causal" if row.is_causal else "not causal"
    return (
        f"{row.level} {row.phase}, {causality}\n{row.dtype}, "
        f"{row.batch_size}×{row.heads}×{row.head_dim}{in_pieces(row.segments)}"
    )


def panels(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by their setting in words, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(panel_title(row), []).append(row)
    return found


def _against_length(
    name: str,
    title: str,
    caption: str,
    rows: list[Row],
    look: Look,
    number: Number,
    label: str,
    tick: Callable[[float], str],
) -> Drawing | None:
    drawn = {
        heading: found
        for heading, found in panels(rows).items()
        if any(number(row) for row in found if row.variant != SDPA)
    }
    return chart(
        name, title, caption, drawn, look, partial(_paint, number=number, label=label, tick=tick)
    )


def _paint(
    axes: Axes,
    rows: list[Row],
    look: Look,
    *,
    number: Number,
    label: str,
    tick: Callable[[float], str],
) -> None:
    shown = sorted((row for row in rows if number(row)), key=lambda row: row.length)
    for name in dict.fromkeys(row.contender for row in shown):
        curve = [row for row in shown if row.contender == name]
        if name == SDPA:
            plot(
                axes,
                [(row.length, number(row)) for row in curve],
                color=INK,
                linestyle="--",
                linewidth=1.2,
                label="SDPA",
                zorder=4,
            )
            continue
        plot(
            axes,
            [(row.length, number(row)) for row in curve],
            label=name,
            **look[name].line_options(),
        )
        for row in curve:
            if bar := _bar(row, number):
                axes.vlines(row.length, bar[0], bar[1], color=look[name].color, linewidth=1.6)
    lengths = sorted({row.length for row in shown})
    log_axis(
        axes,
        "y",
        [*(number(row) for row in shown), *(edge for row in shown for edge in _bar(row, number))],
        tick,
    )
    log_axis(axes, "x", lengths, lambda value: f"{value:,.0f}")
    axes.set_xticks(_spread(lengths), [f"{length:,}" for length in _spread(lengths)])
    axes.set_xlabel("length n (tokens)")
    axes.set_ylabel(label)


def _bar(row: Row, number: Number) -> tuple[float, ...]:
    """The quartiles, where the figure is one of time."""
    return row.seconds_quartiles if row.seconds_quartiles and number(row) == row.seconds else ()


def _time_tick(value: float) -> str:
    return _without_zeros(duration(value).replace(" us", " µs"))


def memory_tick(value: float) -> str:
    """In powers of ten, as the axis is: 30 MB."""
    return _without_zeros(count(int(value))) + "B"


def _without_zeros(text: str) -> str:
    """30.0 ms -> 30 ms."""
    return re.sub(r"\.0+(?= )", "", text)


def _spread(lengths: list[int]) -> list[int]:
    """At most five of the lengths, the longest among them, so that their labels do not touch."""
    step = -(-len(lengths) // 5)
    return lengths[::-1][::step][::-1]
