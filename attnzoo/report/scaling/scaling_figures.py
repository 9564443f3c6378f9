"""The figures of `attnzoo scaling`: the article's, from its formulas, and the zoo beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from attnzoo.cost import article
from attnzoo.cost.hardware import GPU
from attnzoo.cost.layer_costs import CountedVariant
from attnzoo.cost.limits import attention_bytes, attention_macs, attention_roofline, matrix_bytes
from attnzoo.report.axes import log_axis, power_axis, rounded
from attnzoo.report.figures import Drawing
from attnzoo.report.scaling import article_figures
from attnzoo.report.scaling.model_tables import causality
from attnzoo.report.scaling.scaling_report import Scaling
from attnzoo.report.scaling.settings import Settings
from attnzoo.report.style import INK, LINES, MARKERS, PALETTE, new_figure, styles
from attnzoo.results.units import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIANT_LENGTHS = tuple(2**power for power in range(7, 17))

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
            *(partial(article_figures.pairs, n=n) for n in article_figures.PAIR_LENGTHS),
            size=(2.7, 3.0),
        ),
        _drawing(
            "contours",
            "Cost of one product over n and d",
            "MACs of n²·d, one layer. Dotted: the widths of the models.",
            partial(article_figures.contours, scaling),
        ),
        _drawing(
            "flops",
            "Cost of one layer against n",
            "d = 768, in the article's count. Attention passes the projections at n = 2d.",
            article_figures.flops,
        ),
        _drawing(
            "memory",
            "Memory of attention by model and length",
            "GiB of q, k, v, the attention matrices and the output, all layers, 2 bytes an "
            "element; FlashAttention stores no matrices.",
            partial(article_figures.memory, scaling),
            size=(6.0, 3.0),
        ),
        _drawing(
            "rnn",
            "Attention against a recurrent layer",
            "d = 512: attention is the cheaper one up to n = d.",
            article_figures.rnn,
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
            "shares",
            "Shares of a layer",
            "d = 768, feed-forward width 4d, in MACs.",
            article_figures.shares,
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
    power_axis(axes, "x", lengths)
    log_axis(axes, "y", drawn, partial(rounded, write=duration))
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


def _variant_macs(scaling: Scaling, axes: Axes) -> None:
    is_causal, layers = scaling.settings.is_causal, scaling.settings.model.layers
    drawn = _variant_lines(scaling, axes, lambda variant, n: layers * variant.macs(n, is_causal))
    log_axis(axes, "y", drawn, rounded)
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
    power_axis(axes, "x", VARIANT_LENGTHS[::3])
    axes.set_xlabel("sequence length n, tokens")
    return drawn
