"""Figures of a quality study: change against attention MACs, change against length, and which layer
tolerates which attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from attnzoo.quality.quality_rows import EXACT, Row
from attnzoo.report.axes import log_axis
from attnzoo.report.comparison_columns import folded
from attnzoo.report.figures import Drawing, Look, chart, count_tick, plot
from attnzoo.report.quality.quality_tables import as_share, change_in_words, sources
from attnzoo.report.style import INK, new_figure, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 1e-3  # changes below are drawn at it: under 0.1% is the noise of a few thousand tokens
GUESSING = (
    1e3  # and changes above: a model whose guess is any token of its vocabulary is about so far off
)
MOST_SHOWN = 1.0  # of the heat map's scale: a perplexity twice the exact one
CELL_INCHES = (0.21, 0.3)
MIX_COLOR = "#8250df"  # of no variant: mixes are several


def drawings(rows: Sequence[Row]) -> list[Drawing]:
    """The figures that the rows have numbers for."""
    look = styles(
        (row.variant, row.variant)
        for row in rows
        if row.task == "all" and row.variant and as_share(row) is not None
    )
    whole = [row for row in rows if row.task in ("all", "mix") and as_share(row) is not None]
    longest = {
        source: max(row.length for row in whole if row.text == source) for source in sources(whole)
    }
    pareto = {
        f"{source}, {longest[source]:,} tokens": [
            row for row in whole if row.text == source and row.length == longest[source]
        ]
        for source in longest
        if any(row.task == "all" for row in whole if row.text == source)
    }
    words = change_in_words(rows)
    charts = [
        chart(
            "pareto",
            "What swapping every layer costs and saves",
            f"The {words} against the multiply-accumulates of all attentions on one sequence. "
            "Lower left is better; numbers are the variant's "
            "knob. Stars are mixes of attentions by layer, at their tolerance; the grey line is "
            "the Pareto front. "
            f"Changes under {LEAST:.1%} and over {GUESSING:,.0%} are drawn there. Dotted: what "
            "exact attention needs.",
            pareto,
            look,
            partial(_pareto, words=words),
        ),
        chart(
            "length",
            "The same swap at several lengths",
            f"The {words}, every layer swapped; a line for every value of the knob, the larger the "
            "stronger drawn. "
            f"Changes under {LEAST:.1%} and over {GUESSING:,.0%} are drawn there.",
            {
                source: _swept(whole, source)
                for source in longest
                if len({row.length for row in _swept(whole, source)}) > 1
            },
            look,
            partial(_lengths, words=words),
        ),
    ]
    return [drawing for drawing in charts if drawing is not None] + _maps(rows, words)


def knobs(curve: Sequence[Row]) -> list[str]:
    """What tells the rows of one variant from each other, a text for each: the values of the
    options that differ, "64" or "inf"."""
    given = [dict(options) for row in curve for _, options in row.mix.values()]
    names = dict.fromkeys(name for options in given for name in options)
    turned = [name for name in names if len({str(options.get(name)) for options in given}) > 1]
    return [" ".join(str(options[name]) for name in turned if name in options) for options in given]


def _swept(rows: Sequence[Row], source: str) -> list[Row]:
    return [row for row in rows if row.task == "all" and row.text == source]


def _pareto(axes: Axes, rows: list[Row], look: Look, *, words: str) -> None:
    for name in look:
        curve = [row for row in rows if row.task == "all" and row.variant == name]
        plot(
            axes,
            [(row.attention_macs, _drawn(row)) for row in curve],
            label=name,
            zorder=3,
            **{**look[name].line_options(), "linewidth": 1.0},
        )
        for row, knob in zip(curve, knobs(curve), strict=True):
            place = (row.attention_macs or 0, _drawn(row))
            axes.annotate(
                knob,
                place,
                (5, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=look[name].color,
                zorder=4,
            )
    mixes: dict[tuple[int, float], list[str]] = {}  # tolerances by the place of their mix
    for row in rows:
        if row.task == "mix" and row.label != EXACT:
            mixes.setdefault((row.attention_macs or 0, _drawn(row)), []).append(
                f"{row.tolerance:.0%}"
            )
    if mixes:
        plot(
            axes,
            list(mixes),
            label="mix by layer",
            color=MIX_COLOR,
            marker="*",
            markersize=11,
            linestyle="none",
            zorder=5,
        )
    for place, tolerances in mixes.items():
        axes.annotate(
            ", ".join(tolerances),
            place,
            (-6, -9),
            textcoords="offset points",
            fontsize=7.5,
            color=MIX_COLOR,
            ha="right",
            zorder=5,
        )
    plot(
        axes,
        pareto_front(rows),
        color=INK,
        alpha=0.3,
        linewidth=3,
        drawstyle="steps-post",
        zorder=1,
    )
    exact = next(row.exact_attention_macs for row in rows)
    axes.axvline(exact or 0, color=INK, linestyle=":", linewidth=1.2, label="exact attention")
    log_axis(axes, "x", [*(row.attention_macs for row in rows), exact], count_tick)
    log_axis(axes, "y", [*map(_drawn, rows), LEAST], _share)
    axes.set_xlabel("MACs of all attentions")
    axes.set_ylabel(words)


def pareto_front(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(attention MACs, change as drawn) of the rows, exact attention among them, that no other
    beats in both, by rising MACs."""
    front: list[tuple[int, float]] = []
    exact = {(row.exact_attention_macs or 0, LEAST) for row in rows}
    for macs, change in sorted(exact | {(row.attention_macs or 0, _drawn(row)) for row in rows}):
        if not front or change < front[-1][1]:
            front.append((macs, change))
    return front


def _lengths(axes: Axes, rows: list[Row], look: Look, *, words: str) -> None:
    for name in look:
        labels = list(dict.fromkeys(row.label for row in rows if row.variant == name))
        for number, label in enumerate(labels):
            curve = sorted((row for row in rows if row.label == label), key=lambda row: row.length)
            strength = 0.35 + 0.65 * (number + 1) / len(labels)
            options = {
                **look[name].line_options(),
                "markersize": 3.5,
                "linewidth": 1.2,
                "alpha": strength,
            }
            plot(
                axes,
                [(row.length, _drawn(row)) for row in curve],
                label=name if number == len(labels) - 1 else None,
                **options,
            )
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    log_axis(axes, "y", [*map(_drawn, rows), LEAST], _share)
    axes.set_xlabel("length n (tokens)")
    axes.set_ylabel(words)


def _maps(rows: Sequence[Row], words: str) -> list[Drawing]:
    """One heat map a text, below each other: a column a layer, a row a choice."""
    tried = [row for row in rows if row.task == "layer" and as_share(row) is not None]
    if not tried:
        return []
    whole = partial(
        _map_figure,
        {source: [row for row in tried if row.text == source] for source in sources(tried)},
    )
    length = tried[0].length
    title = f"Which layer tolerates which attention, {length:,} tokens"
    caption = (
        f"The {words} when this attention replaces exact attention in this layer alone. Pale "
        "layers can be swapped; dark ones cannot. "
        f"Below {LEAST:.1%} all is drawn alike, and so is all over {MOST_SHOWN:.0%}."
    )
    return [Drawing("layers", title, caption, whole, (whole,))]


def _map_figure(panels: dict[str, list[Row]]) -> Figure:
    import numpy as np
    from matplotlib.colors import LogNorm

    labels = list(dict.fromkeys(row.label for rows in panels.values() for row in rows))
    layers = sorted(
        {row.layer for rows in panels.values() for row in rows if row.layer is not None}
    )
    width = max(5.2, CELL_INCHES[0] * len(layers) + 3.2)
    figure = new_figure(width, (CELL_INCHES[1] * len(labels) + 0.62) * len(panels) + 0.55)
    image = None
    for number, (source, rows) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(len(panels), 1, number)
        cells = np.full((len(labels), len(layers)), np.nan)
        for row in rows:
            if row.layer is not None:
                cells[labels.index(row.label), layers.index(row.layer)] = min(
                    _drawn(row), MOST_SHOWN
                )
        image = axes.imshow(
            cells,
            norm=LogNorm(LEAST, MOST_SHOWN),
            cmap="viridis_r",
            aspect="auto",
            interpolation="nearest",
        )
        axes.grid(False)
        axes.set_title(source, loc="left", fontsize=10)
        axes.set_yticks(range(len(labels)), [folded(label, 30) for label in labels], fontsize=9)
        step = 1 if len(layers) <= 15 else 2
        axes.set_xticks(
            range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8
        )
        axes.tick_params(length=2)
    figure.axes[-1].set_xlabel("layer")
    if image is not None:
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, pad=0.02)
        bar.set_ticks([0.001, 0.01, 0.1, 1.0], labels=["0.1%", "1%", "10%", "100%"])
        bar.ax.tick_params(labelsize=8)
    return figure


def _drawn(row: Row) -> float:
    return min(max(abs(as_share(row) or 0.0), LEAST), GUESSING)


def _share(value: float) -> str:
    """0.01 -> 1%, 10 -> 1,000%."""
    return f"{100 * value:,g}%"
