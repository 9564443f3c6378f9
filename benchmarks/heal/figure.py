"""Draw what healing recovered: python benchmarks/heal/figure.py [--results
benchmarks/results/heal.jsonl] [--output docs/figures/heal.png]"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from attnzoo.report.axes import log_axis
from attnzoo.report.style import INK, RC, Style, new_figure, styles


def draw(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Perplexity over the steps, a panel for each held-out text, and every layer's matching loss
    before, hollow, and after."""
    labels = {_label(row): row for row in rows}
    look = styles((row["recipe"]["variant"], label) for label, row in labels.items())
    texts = list(rows[0]["exact"])
    with matplotlib.rc_context({**RC, "figure.facecolor": "white"}):
        figure = new_figure(4.3 * (len(texts) + 1), 3.8)
        panels = figure.subplots(1, len(texts) + 1)
        for axes, text in zip(panels, texts, strict=False):
            _perplexity(axes, text, labels, look)
        _layers(panels[-1], labels, look)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        figure.savefig(output, dpi=110)


def _label(row: dict[str, Any]) -> str:
    told = [f"{name}={value}" for name, value in row["recipe"]["options"].items()]
    if row["recipe"]["layers"] is not None:
        told.append(f"{len(row['evaluations'][0]['matching_loss'])} layers")
    return f"{row['recipe']['variant']} ({', '.join(told)})" if told else row["recipe"]["variant"]


def _numbers(row: dict[str, Any]) -> list[int]:
    """The layers that were swapped, in the order of their losses."""
    layers, count = row["recipe"]["layers"], len(row["evaluations"][0]["matching_loss"])
    return list(range(count)) if layers is None else [int(one) for one in layers.split(",")]


def _perplexity(
    axes: Axes, text: str, labels: dict[str, dict[str, Any]], look: dict[str, Style]
) -> None:
    everything = []
    for label, row in labels.items():
        steps = [evaluation["step"] for evaluation in row["evaluations"]]
        values = [evaluation["perplexity"][text] for evaluation in row["evaluations"]]
        axes.plot(steps, values, label=label, **look[label].line_options())
        everything += [*values, row["exact"][text]]
    row = next(iter(labels.values()))
    axes.axhline(
        row["exact"][text], color=INK, linestyle=":", linewidth=1.4, label="exact attention"
    )
    axes.axvline(row["recipe"]["matching_steps"], color=INK, linewidth=0.8)
    log_axis(axes, "y", everything, lambda value: f"{value:,g}")
    axes.set_title(f"Perplexity, {text}")
    axes.set_xlabel("step: matching | distillation")


def _layers(axes: Axes, labels: dict[str, dict[str, Any]], look: dict[str, Style]) -> None:
    everything = []
    for label, row in labels.items():
        matched = next(
            evaluation
            for evaluation in row["evaluations"]
            if evaluation["step"] == row["recipe"]["matching_steps"]
        )
        for evaluation, options in (
            (row["evaluations"][0], {"markerfacecolor": "none", "linewidth": 0.6}),
            (matched, {}),
        ):
            losses = evaluation["matching_loss"]
            axes.plot(
                _numbers(row),
                losses,
                **{**look[label].line_options(), "markersize": 4, **options},
            )
            everything += losses
    log_axis(axes, "y", everything, lambda value: f"{value:,g}")
    axes.axhline(1.0, color=INK, linestyle="--", linewidth=0.8)
    axes.set_title("|out − exact|² / |exact|², before (hollow) and after matching")
    axes.title.set_fontsize(9)
    axes.set_xlabel("layer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw perplexity and matching loss of healed models."
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/heal.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/figures/heal.png"))
    args = parser.parse_args()
    draw([json.loads(line) for line in args.results.read_text().splitlines()], args.output)


if __name__ == "__main__":
    main()
