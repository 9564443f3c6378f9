"""The figures of `attnzoo scaling`: the article's, from its formulas, and the zoo beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from attnzoo.cost import article
from attnzoo.cost.hardware import GPU
from attnzoo.cost.layer_costs import CountedVariant
from attnzoo.cost.limits import attention_bytes, attention_macs, attention_roofline, matrix_bytes
from attnzoo.report.axes import log_axis
from attnzoo.report.figures import Drawing
from attnzoo.report.scaling.model_tables import causality
from attnzoo.report.scaling.scaling_report import Scaling
from attnzoo.report.scaling.settings import Settings
from attnzoo.report.style import INK, LINES, MARKERS, PALETTE, new_figure, styles
from attnzoo.results.units import count, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAIR_LENGTHS = (8, 16, 32)
VARIANT_LENGTHS = tuple(2**power for power in range(7, 17))
FLOPS_LENGTHS = tuple(2**power for power in range(6, 15))
ON_LIGHT, ON_DARK = "#000000", "#ffffff"  # text inside coloured cells, which no page recolours

Paint = Callable[["Axes"], None]


def drawings(scaling: Scaling) -> list[Drawing]:
    """All figures, the article's first."""
    model, gpu = scaling.settings.model.title, scaling.settings.gpu.title
    return [
        _drawing(
            "pairs",
            "Every token meets every token",
            "One cell is one score. Doubling n makes four times as many; a causal attention needs "
            "the dark half.",
            *(partial(_pairs, n=n) for n in PAIR_LENGTHS),
            size=(2.7, 3.0),
        ),
        _drawing(
            "contours",
            "Cost of one product over n and d",
            "MACs of n²·d, one layer. Dotted: the widths of the models.",
            partial(_contours, scaling),
        ),
        _drawing(
            "flops",
            "Cost of one layer against n",
            "d = 768, in the article's count. Attention passes the projections at n = 2d.",
            _flops,
        ),
        _drawing(
            "memory",
            "Memory of attention by model and length",
            "GiB of q, k, v, the attention matrices and the output, all layers, 2 bytes an "
            "element; FlashAttention stores no matrices.",
            partial(_memory, scaling),
            size=(6.0, 3.0),
        ),
        _drawing(
            "rnn",
            "Attention against a recurrent layer",
            "d = 512: attention is the cheaper one up to n = d.",
            _rnn,
        ),
        _drawing(
            "time",
            f"Time of attention against n: {model}",
            "All layers. The article takes its rate in MACs, so its line is half of what a "
            "datasheet's rate gives; the others are rooflines.",
            partial(_time, scaling),
            size=(6.0, 4.0),
        ),
        _drawing(
            "shares", "Shares of a layer", "d = 768, feed-forward width 4d, in MACs.", _shares
        ),
        _drawing(
            "variants",
            f"Every variant against n: {model}",
            f"All layers, one sample, bf16, {causality(scaling.settings)}. MACs executed, and "
            "memory kept for the backward pass. "
            "Standard is fused and stores no matrices; the dashed line does. Dotted: "
            f"{scaling.settings.share:.0%} of {gpu}.",
            partial(_variant_macs, scaling),
            partial(_variant_memory, scaling),
            legend="below",
        ),
    ]


def _drawing(
    name: str,
    title: str,
    caption: str,
    *paints: Paint,
    size: tuple[float, float] = (5.0, 3.6),
    legend: str = "inside",
) -> Drawing:
    parts = tuple(partial(_figure, (paint,), size, legend) for paint in paints)
    return Drawing(name, title, caption, partial(_figure, paints, size, legend), parts)


def _figure(paints: tuple[Paint, ...], size: tuple[float, float], legend: str) -> Figure:
    figure = new_figure(size[0] * len(paints), size[1] + (0.7 if legend == "below" else 0.0))
    handles = {}
    for index, paint in enumerate(paints, 1):
        axes = figure.add_subplot(1, len(paints), index)
        paint(axes)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if legend == "below":
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=4 if len(paints) > 1 else 2
        )
    return figure


def _pairs(axes: Axes, n: int) -> None:
    from matplotlib.colors import ListedColormap

    seen = [[1 if key <= query else 0 for key in range(n)] for query in range(n)]
    axes.pcolormesh(
        seen,
        cmap=ListedColormap(["#9ecae1", PALETTE[0]]),
        edgecolors="white",
        linewidth=0.8 if n < 32 else 0.4,
    )
    axes.set(
        aspect="equal",
        xlim=(0, n),
        ylim=(n, 0),
        xlabel="key",
        ylabel="query",
        xticks=[0, n // 2, n],
        yticks=[0, n // 2, n],
    )
    axes.set_title(f"n = {n}: {n * n:,} pairs\n({n * (n + 1) // 2:,} causal)", loc="left")
    axes.grid(False)


def _contours(scaling: Scaling, axes: Axes) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    lengths, widths = (
        [2 ** (power / 4) for power in range(*bounds)]
        for bounds in ((4 * 7, 4 * 17 + 1), (4 * 8, 4 * 13 + 1))
    )
    macs = [[n * n * d for n in lengths] for d in widths]
    levels = [10.0**power for power in range(6, 16)]
    # Light enough for black labels throughout.
    shades = LinearSegmentedColormap.from_list("shades", ["#f7fbff", "#6baed6"])
    axes.contourf(
        lengths, widths, macs, levels=levels, norm=LogNorm(levels[0], levels[-1]), cmap=shades
    )
    lines = axes.contour(
        lengths, widths, macs, levels=levels[1:-2], colors=ON_LIGHT, linewidths=0.8
    )
    axes.clabel(lines, fmt=_rounded, fontsize=8, colors=ON_LIGHT)
    known = {
        model.d: model.title
        for model in reversed(scaling.models)
        if widths[0] <= model.d <= widths[-1]
    }
    for d in known:
        axes.axhline(d, color=ON_LIGHT, linewidth=0.7, linestyle=":")
    right = axes.twinx()
    right.set(yscale="log", ylim=(widths[0], widths[-1]))
    right.set_yticks(list(known), list(known.values()), fontsize=8)
    right.minorticks_off()
    right.tick_params(length=0)
    right.grid(False)
    _power_axis(axes, "x", (128, 512, 2048, 8192, 32768, 131072))
    _power_axis(axes, "y", (256, 512, 1024, 2048, 4096, 8192))
    axes.set(xlabel="sequence length n, tokens", ylabel="width d")
    axes.set_title("MACs of one product, n²·d", loc="left", fontsize=9)
    axes.grid(False)


def _flops(axes: Axes) -> None:
    table = article.attention_flops(FLOPS_LENGTHS)
    for index, (key, label) in enumerate(
        (
            ("flops", "attention: 2n²d + 3n²"),
            ("projections", "projections: 4nd²"),
            ("with_projections", "together"),
        )
    ):
        axes.plot(
            table.values("n"),
            table.values(key),
            color=(*PALETTE[:2], INK)[index],
            marker=MARKERS[index],
            linestyle=LINES[index],
            label=label,
        )
    d = table.parameters["d"]
    axes.axvline(2 * d, color=INK, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"n = 2d = {2 * d:,}",
        (2 * d, table.rows[0]["flops"]),
        xytext=(6, 0),
        textcoords="offset points",
    )
    _power_axis(axes, "x", FLOPS_LENGTHS[::2])
    log_axis(axes, "y", table.values("flops") + table.values("with_projections"), _rounded)
    axes.set(xlabel="sequence length n, tokens", ylabel="operations (1 MAC = 1), one layer")
    axes.legend()


def _memory(scaling: Scaling, axes: Axes) -> None:
    from matplotlib.colors import LogNorm

    lengths = tuple(2**power for power in range(9, 18, 2))
    models = scaling.models
    gib = [
        [
            model.layers * (attention_bytes(model, n) + matrix_bytes(model, n)) / article.GIB
            for n in lengths
        ]
        for model in models
    ]
    norm = LogNorm(0.1, max(map(max, gib)))
    mesh = axes.pcolormesh(gib, cmap="cividis", norm=norm, edgecolors="white", linewidth=1)
    for row, values in enumerate(gib):
        for column, value in enumerate(values):
            text = f"{value:.2f}" if value < 100 else f"{value:,.0f}"
            axes.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color=ON_DARK if norm(value) < 0.55 else ON_LIGHT,
            )
    axes.set_xticks([column + 0.5 for column in range(len(lengths))], [f"{n:,}" for n in lengths])
    axes.set_yticks([row + 0.5 for row in range(len(models))], [model.title for model in models])
    axes.set_ylim(len(models), 0)
    axes.set_xlabel("sequence length n, tokens")
    axes.tick_params(length=0)
    axes.grid(False)
    bar = axes.figure.colorbar(mesh, ax=axes, label="GiB, logarithmic")
    bar.ax.minorticks_off()


def _rnn(axes: Axes) -> None:
    table = article.rnn_crossover()
    d = table.parameters["d"]
    axes.plot(
        table.values("n"),
        table.values("attention"),
        color=PALETTE[0],
        marker="o",
        label="attention: n²·d",
    )
    axes.plot(
        table.values("n"),
        table.values("rnn"),
        color=PALETTE[1],
        marker="s",
        linestyle="--",
        label="recurrent: n·d²",
    )
    axes.axvline(d, color=INK, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"n = d = {d}", (d, table.rows[0]["attention"]), xytext=(6, 0), textcoords="offset points"
    )
    _power_axis(axes, "x", table.values("n"))
    log_axis(axes, "y", table.values("attention"), _rounded)
    axes.set(xlabel="sequence length n, tokens", ylabel="MACs, one layer")
    axes.legend()


def _time(scaling: Scaling, axes: Axes) -> None:
    settings = scaling.settings
    lengths = article.TIME_LENGTHS
    rate = article.RATE
    in_macs = [attention_macs(settings.model, n, settings.is_causal) / rate for n in lengths]
    axes.plot(
        lengths,
        in_macs,
        color=INK,
        marker="o",
        markersize=5,
        label=f"the article: {rate / 1e12:g}·10¹² MACs/s",
    )
    drawn = list(in_macs)
    for index, (label, gpu) in enumerate(_by_rate(scaling).items()):
        seconds = [
            attention_roofline(settings.model, n, gpu, settings.is_causal).seconds for n in lengths
        ]
        look: dict[str, Any] = {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[(index + 1) % len(MARKERS)],
            "linestyle": LINES[(index + 1) % len(LINES)],
        }
        axes.plot(lengths, seconds, markersize=5, label=f"{label}: {gpu.tflops:,g} TFLOP/s", **look)
        drawn += seconds
    _power_axis(axes, "x", lengths)
    log_axis(axes, "y", drawn, partial(_rounded, write=duration))
    axes.set(xlabel="sequence length n, tokens", ylabel="least time of attention, all layers")
    axes.legend()


def _by_rate(scaling: Scaling) -> dict[str, GPU]:
    """One GPU for every peak rate, under the names of all that share it."""
    titles: dict[float, list[str]] = {}
    found = {}
    for gpu in scaling.gpus:
        titles.setdefault(gpu.tflops, []).append(gpu.title)
        found.setdefault(gpu.tflops, gpu)
    return {" / ".join(titles[rate]): gpu for rate, gpu in found.items()}


def _shares(axes: Axes) -> None:
    table = article.layer_breakdown(
        tuple(round(2 ** (power / 4)) for power in range(4 * 7, 4 * 14 + 1))
    )
    parts = ("ffn", "projections", "attention")
    stacks = axes.stackplot(
        table.values("n"),
        *(table.values(part) for part in parts),
        colors=("#56b4e9", "#e69f00", PALETTE[0]),
        alpha=0.9,
    )
    for part, label in zip(stacks, ("feed-forward", "projections", "attention"), strict=True):
        part.set_label(label)
    _power_axis(axes, "x", table.values("n")[::4])
    axes.set(
        xlim=(table.values("n")[0], table.values("n")[-1]),
        ylim=(0, 100),
        xlabel="sequence length n, tokens",
        ylabel="share of a layer's MACs, %",
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="lower left",
        facecolor="white",
        frameon=True,
        framealpha=0.9,
        labelcolor=ON_LIGHT,
    )


def _variant_macs(scaling: Scaling, axes: Axes) -> None:
    is_causal, layers = scaling.settings.is_causal, scaling.settings.model.layers
    drawn = _variant_lines(scaling, axes, lambda variant, n: layers * variant.macs(n, is_causal))
    log_axis(axes, "y", drawn, _rounded)
    axes.set_ylabel("MACs, all layers")


def _variant_memory(scaling: Scaling, axes: Axes) -> None:
    settings = scaling.settings
    layers = settings.model.layers
    drawn = _variant_lines(scaling, axes, partial(_kept_gib, settings))
    stored = [
        layers
        * (attention_bytes(settings.model, n) + matrix_bytes(settings.model, n))
        / article.GIB
        for n in VARIANT_LENGTHS
    ]
    axes.plot(VARIANT_LENGTHS, stored, color=INK, linestyle="--", label="standard, matrices stored")
    budget = settings.share * settings.gpu.memory_bytes / article.GIB
    axes.axhline(budget, color=INK, linewidth=0.9, linestyle=":")
    axes.annotate(
        f"{settings.share:.0%} of {settings.gpu.title}",
        (VARIANT_LENGTHS[0], budget),
        xytext=(0, 4),
        textcoords="offset points",
    )
    log_axis(axes, "y", drawn + stored, lambda value: f"{value:,g}")
    axes.set_ylabel("GiB kept, all layers")


def _kept_gib(settings: Settings, variant: CountedVariant, n: int) -> float | None:
    kept = variant.kept_bytes(n, settings.is_causal)
    return None if kept is None else settings.model.layers * kept / article.GIB


def _variant_lines(scaling: Scaling, axes: Axes, value: Callable) -> list[float]:
    """One line a variant that runs as the settings say; returns every number drawn."""
    look = styles((variant.choice.name, variant.label) for variant in scaling.variants)
    drawn: list[float] = []
    for variant in scaling.variants:
        if variant.runs(scaling.settings.is_causal):
            values = [found for n in VARIANT_LENGTHS if (found := value(variant, n)) is not None]
            axes.plot(
                VARIANT_LENGTHS[: len(values)],
                values,
                label=variant.label,
                **{**look[variant.label].line_options(), "markersize": 5},
            )
            drawn += values
    _power_axis(axes, "x", VARIANT_LENGTHS[::3])
    axes.set_xlabel("sequence length n, tokens")
    return drawn


def _rounded(value: float, write: Callable[[Any], str] = count) -> str:
    """A tick's number: 10 G, not 10.0 G."""
    return re.sub(r"\.0+(?= )", "", write(value)).replace("us", "µs")


def _power_axis(axes: Axes, which: str, values: Iterable[int]) -> None:
    """A base-2 logarithmic axis with ticks at `values`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
