"""The figures of the article, from its formulas: each function fills the axes that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnzoo.cost import article
from attnzoo.cost.limits import attention_bytes, matrix_bytes
from attnzoo.report.axes import log_axis, power_axis, rounded
from attnzoo.report.scaling.scaling_report import Scaling
from attnzoo.report.style import INK, LINES, MARKERS, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ON_LIGHT, ON_DARK = "#000000", "#ffffff"  # text inside coloured cells, which no page recolours
PAIR_LENGTHS = (8, 16, 32)


FLOPS_LENGTHS = tuple(2**power for power in range(6, 15))


def pairs(axes: Axes, n: int) -> None:
    """One cell a score of n tokens, the causal ones dark."""
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


def contours(scaling: Scaling, axes: Axes) -> None:
    """MACs of n²·d over n and d, and the widths of the models."""
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
    axes.clabel(lines, fmt=rounded, fontsize=8, colors=ON_LIGHT)
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
    power_axis(axes, "x", (128, 512, 2048, 8192, 32768, 131072))
    power_axis(axes, "y", (256, 512, 1024, 2048, 4096, 8192))
    axes.set(xlabel="sequence length n, tokens", ylabel="width d")
    axes.set_title("MACs of one product, n²·d", loc="left", fontsize=9)
    axes.grid(False)


def flops(axes: Axes) -> None:
    """Operations of one layer against n."""
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
    power_axis(axes, "x", FLOPS_LENGTHS[::2])
    log_axis(axes, "y", table.values("flops") + table.values("with_projections"), rounded)
    axes.set(xlabel="sequence length n, tokens", ylabel="operations (1 MAC = 1), one layer")
    axes.legend()


def memory(scaling: Scaling, axes: Axes) -> None:
    """GiB of attention by model and length, as a coloured table."""
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


def rnn(axes: Axes) -> None:
    """MACs of attention and of a recurrent layer against n."""
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
    power_axis(axes, "x", table.values("n"))
    log_axis(axes, "y", table.values("attention"), rounded)
    axes.set(xlabel="sequence length n, tokens", ylabel="MACs, one layer")
    axes.legend()


def shares(axes: Axes) -> None:
    """Shares of a layer's MACs against n, stacked."""
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
    power_axis(axes, "x", table.values("n")[::4])
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
