"""Linformer's Figure 1: how much of A's singular values the first 128 of 512 hold, by layer and
head, in two real models.

    python -m benchmarks.papers.linformer_spectrum [--quick] [--redraw]

The paper sums singular values. Their squares are what a truncated A is wrong by, so the error of
the best A of rank 128 stands beside. A control has the same rows with each row's entries shuffled:
as concentrated, without structure between rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.fidelity.metrics import exact_rows
from attnzoo.fidelity.pretrained import SOURCES, capture, load
from attnzoo.texts.plays import play
from benchmarks.papers.study import Row, panels, run

NAME = "linformer_spectrum"
LENGTH, RANK = 512, 128


def cumulative(values: Tensor) -> Tensor:
    """Normalised cumulative sum of singular values, descending, along the last dimension."""
    return values.cumsum(-1) / values.sum(-1, keepdim=True)


def best_error(values: Tensor, rank: int) -> Tensor:
    """||A - its best approximation of that rank||_F / ||A||_F, from A's singular values."""
    squares = values.square()
    return (squares[..., rank:].sum(-1) / squares.sum(-1)).sqrt()


def shuffled(a: Tensor, is_causal: bool) -> Tensor:
    """Every row's visible entries in an order of their own."""
    order = torch.rand(a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if is_causal:  # the hidden ones stay last
        order = order + torch.ones(a.shape[-2:], dtype=torch.float64).triu(1)
    return a.gather(-1, order.argsort(-1))


def measure(quick: bool) -> Iterator[Row]:
    length = LENGTH // 4 if quick else LENGTH
    rank = length * RANK // LENGTH
    for model in SOURCES:
        pretrained = load(model)
        layers, heads = (
            pretrained.model.config.num_hidden_layers,
            pretrained.model.config.num_attention_heads,
        )
        sample = capture(
            pretrained, play("hamlet"), length, layers=range(layers), heads=range(heads)
        )
        for layer in range(layers):
            a = exact_rows(
                sample.q[layer : layer + 1],
                sample.k[layer : layer + 1],
                range(length),
                is_causal=sample.is_causal,
            )[0]
            values = torch.linalg.svdvals(a)
            control = torch.linalg.svdvals(shuffled(a, sample.is_causal))
            held = cumulative(values)
            yield {
                "model": model,
                "layer": layer,
                "length": length,
                "rank": rank,
                "held": float(held[:, rank - 1].mean()),
                "held_when_shuffled": float(cumulative(control)[:, rank - 1].mean()),
                "best_error": float(best_error(values, rank).mean()),
                "best_error_when_shuffled": float(best_error(control, rank).mean()),
                "held_by_head": [round(float(x), 4) for x in held[:, rank - 1]],
                "curve": [round(float(x), 4) for x in held.mean(0)],
            }


def draw(rows: Sequence[Row], path: Path) -> None:
    """A row of panels for each model: the cumulative curve of every layer, and the share that the
    first 128 hold, by layer and head."""
    import matplotlib

    from attnzoo.report.style import INK, PALETTE

    models = list(dict.fromkeys(row["model"] for row in rows))
    lowest = min(min(row["held_by_head"]) for row in rows)
    with panels(path, 2, len(models)) as axes:
        for model, left, right in zip(models, axes[::2], axes[1::2], strict=True):
            found = [row for row in rows if row["model"] == model]
            rank, length = found[0]["rank"], found[0]["length"]
            colors = matplotlib.colormaps["viridis"].resampled(len(found))
            for row in found:
                left.plot(
                    range(1, length + 1), row["curve"], color=colors(row["layer"]), linewidth=1
                )
            control = sum(row["held_when_shuffled"] for row in found) / len(found)
            left.plot(
                [rank],
                [control],
                "X",
                color=PALETTE[1],
                markersize=9,
                markeredgecolor="white",
                label="rows shuffled, mean of the layers",
            )
            left.axvline(rank, color=INK, linestyle=":", linewidth=1.2)
            left.set_title(f"{model}, n = {length}: a line is a layer, dark is early")
            left.title.set_fontsize(10)
            left.set_xlabel("largest singular values summed")
            left.set_ylabel("share of their sum")
            left.set_ylim(0, 1.02)
            image = right.imshow(
                list(zip(*(row["held_by_head"] for row in found), strict=True)),
                aspect="auto",
                vmin=lowest,
                vmax=1,
                origin="lower",
            )
            right.grid(False)
            right.figure.colorbar(image, ax=right)
            right.set_title(f"share held by the first {rank}")
            right.title.set_fontsize(10)
            right.set_xlabel("layer")
            right.set_ylabel("head")


if __name__ == "__main__":
    run(NAME, measure, draw)
