"""Figures of a comparison: error against MACs, error against length, measured speed-up against MAC
speed-up, A beside exact A."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from attnzoo.fidelity.comparison_rows import Comparison, Row
from attnzoo.report.axes import log_axis
from attnzoo.report.comparison_columns import folded, group_title, grouped, is_exact
from attnzoo.report.heatmaps import heat_map_figure, heat_map_groups, heat_map_names
from attnzoo.report.style import INK, Style, new_figure, styles
from attnzoo.results.units import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (4.3, 3.2)
COLUMNS_OF_PANELS = 2
LEGEND_CHARACTERS = 19  # a longer label is folded: two columns of them stand under one panel
LEGEND_INCHES_PER_CHARACTER = 0.078  # at 9 points

Look = Mapping[str, Style]
Paint = Callable[["Axes", list[Any], Look], None]
AVERAGE = "average of the values"
Panels = Mapping[str, list[Any]]  # rows, of a comparison or of a benchmark, by the panel's heading


@dataclass(frozen=True)
class Drawing:
    """One figure.

    name: of its files, without the ending.
    whole: draws all panels as one picture.
    parts: each draws one panel, for narrow pages.
    """

    name: str
    title: str
    caption: str
    whole: Callable[[], Figure]
    parts: tuple[Callable[[], Figure], ...]


def drawings(comparison: Comparison) -> list[Drawing]:
    """The figures that the comparison has numbers for."""
    look = styles((row.variant, row.label) for row in (*comparison.rows, *comparison.by_length))
    results = {group_title(group): rows for group, rows in grouped(comparison.rows).items()}
    charts = [
        chart(
            "error-macs",
            "Error against multiply-accumulates",
            "Lower left is better. The grey line is the Pareto front: no other variant beats one "
            "on it in both. Above the dashed line a variant "
            "lost to answering the average of the values; the dotted line is what exact attention "
            "costs.",
            {title: rows for title, rows in results.items() if _approximate(rows)},
            look,
            _error_against_macs,
        ),
        chart(
            "error-length",
            "Error against length",
            "The same text, read to shorter lengths. The dashed line is the error of answering the "
            "average of the values. "
            "Where a variant sees all that softmax sees it is exact, and has no point.",
            {
                title: rows
                for title, rows in _by_model(comparison.by_length).items()
                if len({row.length for row in rows}) > 1
            },
            look,
            _error_against_length,
        ),
        chart(
            "speed-up",
            "Measured speed-up against MAC speed-up",
            "On the diagonal, saved arithmetic is saved time. Below the dashed line a variant is "
            "slower than exact attention.",
            {
                title: rows
                for title, rows in results.items()
                if any(row.speedup and row.promised_speedup for row in rows)
            },
            look,
            _measured_against_macs,
        ),
    ]
    return [drawn for drawn in charts if drawn is not None] + _heat_map_drawings(comparison)


def chart(
    name: str, title: str, caption: str, panels: Panels, look: Look, paint: Paint
) -> Drawing | None:
    """A figure of one panel a heading, each filled by `paint`; None without panels."""
    if not panels:
        return None
    parts = tuple(
        partial(_figure, {heading: rows}, look, paint) for heading, rows in panels.items()
    )
    return Drawing(name, title, caption, partial(_figure, panels, look, paint), parts)


def _heat_map_drawings(comparison: Comparison) -> list[Drawing]:
    found = []
    groups = heat_map_groups(comparison.heat_maps)
    file_names = heat_map_names(groups)
    for group, maps in groups.items():
        draw = partial(heat_map_figure, maps)
        first = maps[0]
        title = (
            f"A beside exact A: {first.model}, {first.layer}, head {first.head}, the first "
            f"{first.length:,} tokens"
        )
        caption = (
            "Rows are queries, columns are keys. A cell is the mass that its queries put, on "
            "average, on all its keys, on a logarithmic scale; "
            "grey is nothing and red is negative."
        )
        found.append(Drawing(file_names[group], title, caption, draw, (draw,)))
    return found


def _figure(panels: Panels, look: Look, paint: Paint) -> Figure:
    columns = min(len(panels), COLUMNS_OF_PANELS)
    rows_of_panels = -(-len(panels) // columns)
    handles: dict[str, Any] = {}
    figure = new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows_of_panels)
    for index, (heading, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(rows_of_panels, columns, index + 1)
        axes.set_title(heading, loc="left")
        paint(axes, rows, look)
        found, labels = axes.get_legend_handles_labels()
        handles.update(dict(zip(labels, found, strict=True)))
    _add_legend(figure, [label for label in (*look, *handles) if label in handles], handles)
    return figure


def _add_legend(figure: Figure, labels: list[str], handles: dict[str, Any]) -> None:
    """One legend below all panels, in as many columns as the longest label leaves room for; the
    figure grows by its height."""
    labels = list(dict.fromkeys(labels))
    texts = [folded(label, LEGEND_CHARACTERS) for label in labels]
    width, height = figure.get_size_inches()
    widest = max(len(line) for text in texts for line in text.split("\n"))
    columns = max(1, int(width / (LEGEND_INCHES_PER_CHARACTER * widest + 0.55)))
    figure.set_size_inches(width, height + _legend_inches(texts, columns))
    figure.legend(
        [handles[label] for label in labels], texts, loc="outside lower center", ncols=columns
    )


def _legend_inches(texts: list[str], columns: int) -> float:
    """Height of a legend that fills its columns from above, at 9 points: so the panels above it
    keep one height."""
    entries = [0.15 * (text.count("\n") + 1) + 0.065 for text in texts]
    tallest, more = divmod(len(entries), columns)
    sizes = [tallest + (column < more) for column in range(columns)]
    stops = [sum(sizes[: column + 1]) for column in range(columns)]
    return 0.15 + max(
        sum(entries[stop - size : stop]) for size, stop in zip(sizes, stops, strict=True)
    )


def _error_against_macs(axes: Axes, rows: list[Row], look: Look) -> None:
    points = _approximate(rows)
    front = pareto_front(points)
    plot(axes, front, color=INK, alpha=0.35, linewidth=3, drawstyle="steps-post", zorder=1)
    for row in points:
        plot(
            axes,
            [(row.macs, row.output_error)],
            label=row.label,
            zorder=3,
            **look[row.label].point_options(),
        )
    exact = next((row.exact_macs for row in rows if row.exact_macs), None)
    if exact is not None:
        axes.axvline(exact, color=INK, linestyle=":", linewidth=1.2, label="exact attention")
    _draw_mean_value(axes, rows)
    log_axis(axes, "x", [*(row.macs for row in points), exact], count_tick)
    log_axis(axes, "y", [*(row.output_error for row in points), _mean_value_error(rows)], _plain)
    axes.set_xlabel("multiply-accumulates of one forward")
    axes.set_ylabel("relative output error")


def pareto_front(rows: Iterable[Row]) -> list[tuple[int, float]]:
    """(macs, error) of the rows that no other row beats in both, by rising MACs."""
    front: list[tuple[int, float]] = []
    for row in sorted(rows, key=lambda row: (row.macs or 0, row.output_error or 0.0)):
        if (
            row.macs
            and row.output_error is not None
            and (not front or row.output_error < front[-1][1])
        ):
            front.append((row.macs, row.output_error))
    return front


def _error_against_length(axes: Axes, rows: list[Row], look: Look) -> None:
    lengths = sorted({row.length for row in rows})
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        if row.output_error and not is_exact(row):
            curves.setdefault(row.label, []).append(row)
    for label, curve in curves.items():
        plot(
            axes,
            [(row.length, row.output_error) for row in curve],
            label=label,
            **look[label].line_options(),
        )
    baseline = {row.length: row.mean_value_error for row in rows if row.mean_value_error}
    plot(
        axes,
        sorted(baseline.items()),
        color=INK,
        linestyle="--",
        linewidth=1.2,
        label=AVERAGE,
        zorder=4,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    log_axis(
        axes,
        "y",
        [*(row.output_error for curve in curves.values() for row in curve), *baseline.values()],
        _plain,
    )
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("relative output error")


def _measured_against_macs(axes: Axes, rows: list[Row], look: Look) -> None:
    points = [row for row in rows if row.speedup and row.promised_speedup]
    for row in points:
        plot(
            axes,
            [(row.promised_speedup, row.speedup)],
            label=row.label,
            zorder=3,
            **look[row.label].point_options(),
        )
    axes.axline((1, 1), (10, 10), color=INK, alpha=0.35, linewidth=3, zorder=1)
    axes.axhline(1, color=INK, linestyle="--", linewidth=1.2, label="as fast as SDPA", zorder=1)
    log_axis(axes, "x", [*(row.promised_speedup for row in points), 1.0], ratio_tick)
    log_axis(axes, "y", [*(row.speedup for row in points), 1.0], ratio_tick)
    axes.set_xlabel("MAC speed-up")
    axes.set_ylabel("measured speed-up over SDPA")


def plot(axes: Axes, points: Sequence[tuple[float | None, float | None]], **options: Any) -> None:
    """A line through the points that are known."""
    known = [(x, y) for x, y in points if x is not None and y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], **options)


def ratio_tick(value: float) -> str:
    """2 -> "2×", 0.5 -> "0.5×"."""
    return f"{value:g}×"


def count_tick(value: float) -> str:
    """3e9 -> "3 G"."""
    return re.sub(r"\.0*(?= |$)", "", count(int(value)))


def _plain(value: float) -> str:
    return f"{value:g}"


def _draw_mean_value(axes: Axes, rows: list[Row]) -> None:
    error = _mean_value_error(rows)
    if error:
        axes.axhline(error, color=INK, linestyle="--", linewidth=1.2, label=AVERAGE, zorder=1)


def _mean_value_error(rows: list[Row]) -> float | None:
    return next((row.mean_value_error for row in rows if row.mean_value_error), None)


def _approximate(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.output_error and row.macs and not is_exact(row)]


def _by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(
            f"{row.model}, {'causal' if row.is_causal else 'bidirectional'}", []
        ).append(row)
    return models
