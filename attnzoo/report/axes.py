"""Logarithmic axes whose ticks can be read, whatever they span."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from attnzoo.results.units import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 0.08  # of the span, in decades, on either side
CLOSEST = 0.13  # of the span, between two labels
LEADING = (1, 3, 2, 5, 1.5, 7, 4, 1.2)
NARROWEST = 0.35  # decades: points that nearly coincide still get an axis


def log_axis(
    axes: Axes,
    which: Literal["x", "y"],
    values: Iterable[float | None],
    label: Callable[[float], str],
) -> None:
    """Make one axis logarithmic around the positive `values`, with labelled ticks: powers of ten,
    or finer ones on a short axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    logs = [math.log10(value) for value in values if value is not None and value > 0]
    low, high = _widened(min(logs), max(logs))
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(10**low, 10**high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(10**low, 10**high)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(float(f"{value:.3g}"))))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10**low and 10**high, none closer to another than `CLOSEST`: powers of
    ten first, then the roundest that fit."""
    chosen: list[float] = []
    for leading in LEADING:
        for power in range(math.floor(low), math.ceil(high) + 1):
            place = math.log10(leading) + power
            if low <= place <= high and all(
                abs(place - other) >= CLOSEST * (high - low) for other in chosen
            ):
                chosen.append(place)
    return [float(f"{10**place:.3g}") for place in sorted(chosen)]


def _widened(low: float, high: float) -> tuple[float, float]:
    missing = max(0.0, NARROWEST - (high - low)) / 2
    margin = MARGIN * max(high - low, NARROWEST)
    return low - missing - margin, high + missing + margin


def rounded(value: float, write: Callable[[Any], str] = count) -> str:
    """A tick's number: 10 G, not 10.0 G."""
    return re.sub(r"\.0+(?= )", "", write(value)).replace("us", "µs")


def power_axis(axes: Axes, which: str, values: Iterable[int]) -> None:
    """A base-2 logarithmic axis with ticks at `values`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
