"""Performer's Lemma 2 and Theorem 2: how far each kind of random feature is from exp(x·y), and what
orthogonal directions gain.

    python -m benchmarks.papers.performer_kernel [--quick] [--redraw]

m = d = 16: the paper's theorem wants m ≤ d. Vectors x and y of one length, at angles from 0 to π;
many draws of m directions each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.variants.performer.random_features import RandomFeatures
from benchmarks.papers.study import Row, panels, run

NAME = "performer_kernel"
DIMENSION = FEATURES = 16
LENGTHS = (0.4, 0.8)
ANGLES = 9
DRAWS_AT_ONCE, ROUNDS = 4000, 50
KINDS = ("positive", "hyperbolic", "trigonometric")


def closed_form(kind: str, x: Tensor, y: Tensor, features: int) -> Tensor:
    """Mean squared error of the estimate of exp(x·y) by `features` independent directions
    (Choromanski et al. 2021, Lemma 2)."""
    kernel, plus, minus = (x * y).sum(-1).exp(), (x + y).square().sum(-1), (x - y).square().sum(-1)
    if kind == "trigonometric":
        return plus.exp() * kernel**-2 * (1 - (-minus).exp()) ** 2 / (2 * features)
    positive = plus.exp() * kernel**2 * (1 - (-plus).exp()) / features
    return positive if kind == "positive" else (1 - (-plus).exp()) / 2 * positive


def orthogonal_gain(x: Tensor, y: Tensor, features: int) -> Tensor:
    """By how much orthogonal directions lower the error of positive features at least (Theorem
    2)."""
    kernel, base = (x * y).sum(-1).exp(), (-(x.square() + y.square()).sum(-1) / 2).exp()
    return 2 * (features - 1) / (features * (x.shape[-1] + 2)) * (kernel - base) ** 2


def estimates(
    kind: str, x: Tensor, y: Tensor, draws: int, *, features: int, orthogonal: bool, seed: int
) -> Tensor:
    """(draws, pairs): φ(x)·φ(y) from independent draws of `features` directions, which are the rows
    of one long draw, cut up."""
    maps = RandomFeatures(
        x.shape[-1], draws * features, kind, orthogonal=orthogonal, seed=seed, scale=1.0
    ).double()
    (phi_x, log_x), (phi_y, log_y) = maps.key(x), maps.key(y)
    assert log_x is not None and log_y is not None
    terms = phi_x * phi_y * (log_x + log_y).exp()[..., None] * draws
    return terms.unflatten(-1, (-1, draws, features)).sum((1, 3)).T


def measure(quick: bool) -> Iterator[Row]:
    angles = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    rounds = 3 if quick else ROUNDS
    for length in LENGTHS:
        x = torch.zeros(ANGLES, DIMENSION, dtype=torch.float64)
        x[:, 0] = length
        y = torch.zeros_like(x)
        y[:, 0], y[:, 1] = length * angles.cos(), length * angles.sin()
        for kind in KINDS:
            for orthogonal in (False, True):
                yield from _compare(kind, orthogonal, length, angles, x, y, rounds)


def _compare(
    kind: str, orthogonal: bool, length: float, angles: Tensor, x: Tensor, y: Tensor, rounds: int
) -> Iterator[Row]:
    exact, expected = (x * y).sum(-1).exp(), closed_form(kind, x, y, FEATURES)
    gain = orthogonal_gain(x, y, FEATURES)
    total, squares = (
        torch.zeros(ANGLES, dtype=torch.float64),
        torch.zeros(ANGLES, dtype=torch.float64),
    )
    for seed in range(rounds):
        errors = (
            estimates(
                kind, x, y, DRAWS_AT_ONCE, features=FEATURES, orthogonal=orthogonal, seed=seed
            )
            - exact
        ).square()
        total += errors.sum(0)
        squares += errors.square().sum(0)
    count = rounds * DRAWS_AT_ONCE
    mean = total / count
    standard_error = ((squares / count - mean**2).clamp(min=0) / count).sqrt()
    for i in range(ANGLES):
        yield {
            "kind": kind,
            "orthogonal": orthogonal,
            "length": length,
            "angle": float(angles[i]),
            "mean_squared_error": float(mean[i]),
            "standard_error": float(standard_error[i]),
            "lemma_2": float(expected[i]),
            "theorem_2": float(expected[i] - gain[i])
            if kind == "positive" and orthogonal
            else None,
            "draws": count,
        }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Left: measured errors (points) on the closed forms (lines). Right: what orthogonal directions
    leave of the error, beside the bound."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, LINES, MARKERS, PALETTE

    with panels(path) as (left, right):
        shown = LENGTHS[-1]
        for kind, color, marker, line in zip(KINDS, PALETTE, MARKERS, LINES, strict=False):
            iid = [
                row
                for row in rows
                if row["kind"] == kind and not row["orthogonal"] and row["length"] == shown
            ]
            angles = [row["angle"] / math.pi for row in iid]
            left.plot(
                angles, [row["lemma_2"] or math.nan for row in iid], color=color, linestyle=line
            )
            left.plot(
                angles,
                [row["mean_squared_error"] for row in iid],
                color=color,
                marker=marker,
                linestyle="none",
                label=f"{kind}, measured",
            )
        left.plot([], [], color=INK, label="Lemma 2, Theorem 2")
        log_axis(
            left,
            "y",
            [
                row["mean_squared_error"]
                for row in rows
                if row["length"] == shown and row["mean_squared_error"] > 1e-6
            ],
            "{:g}".format,
        )
        left.set_title(f"Mean squared error of exp(x·y)\n|x| = |y| = {shown:g}, m = d = {FEATURES}")
        for length, color, marker in zip(LENGTHS, PALETTE[3:], MARKERS[3:], strict=False):
            found = [
                row
                for row in rows
                if row["kind"] == "positive"
                and row["orthogonal"]
                and row["length"] == length
                and row["lemma_2"] > 1e-9
            ]
            angles = [row["angle"] / math.pi for row in found]
            right.plot(angles, [row["theorem_2"] / row["lemma_2"] for row in found], color=color)
            right.errorbar(
                angles,
                [row["mean_squared_error"] / row["lemma_2"] for row in found],
                [2 * row["standard_error"] / row["lemma_2"] for row in found],
                color=color,
                marker=marker,
                linestyle="none",
                capsize=2,
                label=f"orthogonal, |x| = {length:g}",
            )
        right.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        right.set_title(
            "Error of orthogonal over independent directions\npositive features; lines: bound of "
            "Theorem 2"
        )
        for axes in (left, right):
            axes.set_xlabel("angle between x and y, in units of π")


if __name__ == "__main__":
    run(NAME, measure, draw)
