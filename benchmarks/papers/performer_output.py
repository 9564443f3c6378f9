"""Performer's Figure 4: error of the output against the number of features, with what the paper
leaves out: mean(v) and the score scale.

    python -m benchmarks.papers.performer_output [--quick] [--redraw]

Random inputs of the paper's size (4,096 tokens, head_dim 16, 15 samples) at three score scales, and
the queries and keys of two real models, as they are and with their scores divided by 4 and 16.
Error: relative, of A·v against exact attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import attnzoo
from attnzoo.fidelity.comparison_rows import Sample
from attnzoo.fidelity.metrics import exact_output, mean_value_output, relative_error
from attnzoo.fidelity.pretrained import SOURCES, capture, load
from attnzoo.fidelity.synthetic import synthetic_sample
from attnzoo.texts.plays import play
from benchmarks.papers.study import Row, panels, run

NAME = "performer_output"
LENGTH, HEAD_DIM, SAMPLES, DRAWS = 4096, 16, 15, 3
SPREADS = (0.25, 1.0, 4.0)  # standard deviation of the scores
FEATURES = (16, 64, 256, 1024)
MAPS = (("positive", True), ("positive", False), ("trigonometric", True), ("trigonometric", False))
REAL_LENGTH, DIVISORS = 512, (1, 4, 16)


def measure(quick: bool) -> Iterator[Row]:
    length, samples = (256, 3) if quick else (LENGTH, SAMPLES)
    features = FEATURES[:2] if quick else FEATURES
    captured = [capture(load(model), play("hamlet"), REAL_LENGTH) for model in SOURCES]
    for spread in SPREADS:
        inputs = [
            synthetic_sample(
                length,
                is_causal=False,
                spread=spread,
                heads=1,
                kv_heads=1,
                head_dim=HEAD_DIM,
                seed=seed,
            )
            for seed in range(samples)
        ]
        yield from _errors(f"random, score std {spread:g}", inputs, MAPS, features, draws=1)
    for sample in captured:
        for divisor in DIVISORS:
            root = divisor**0.5  # shared out, since the estimate's variance grows with |q + k|²
            cooled = replace(
                sample, q=sample.q / root, k=sample.k / root, score_std=sample.score_std / divisor
            )
            name = sample.model if divisor == 1 else f"{sample.model}, scores / {divisor}"
            yield from _errors(name, [cooled], MAPS[:1], features, draws=DRAWS)


def _errors(
    source: str,
    samples: Sequence[Sample],
    maps: Sequence[tuple[str, bool]],
    features: Sequence[int],
    draws: int,
) -> Iterator[Row]:
    exact = [
        exact_output(sample.q, sample.k, sample.v, is_causal=sample.is_causal) for sample in samples
    ]
    nothing = [
        relative_error(
            mean_value_output(sample.v, sample.q.shape[1], is_causal=sample.is_causal), wanted
        ).mean()
        for sample, wanted in zip(samples, exact, strict=True)
    ]
    for kind, orthogonal in maps:
        for num_features in features:
            errors = []
            for number, (sample, wanted) in enumerate(zip(samples, exact, strict=True)):
                for draw_number in range(draws):
                    attention = attnzoo.build(
                        "performer",
                        heads=sample.q.shape[1],
                        head_dim=sample.q.shape[3],
                        num_features=num_features,
                        features=kind,
                        orthogonal=orthogonal,
                        seed=number * draws + draw_number,
                    )
                    with torch.no_grad():
                        out = attention(sample.q, sample.k, sample.v, is_causal=sample.is_causal)
                    errors.append(relative_error(out, wanted).mean())
            found = torch.stack(errors)
            yield {
                "source": source,
                "length": samples[0].length,
                "score_std": sum(sample.score_std for sample in samples) / len(samples),
                "features": kind,
                "orthogonal": orthogonal,
                "num_features": num_features,
                "error": float(found.mean()),
                "spread": float(found.std(unbiased=False)),
                "mean_value_error": float(torch.stack(nothing).mean()),
            }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Random inputs at two scales, then the two models; a dotted line is the error of answering
    mean(v), in the colour of what it belongs to."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, MARKERS, PALETTE

    synthetic = [f"random, score std {spread:g}" for spread in SPREADS[:2]]
    models = list(
        dict.fromkeys(
            row["source"].split(",")[0] for row in rows if not row["source"].startswith("random")
        )
    )[:2]
    with panels(path, 2, 2) as axes:
        for one, source in zip(axes, synthetic, strict=False):
            found = [row for row in rows if row["source"] == source]
            for (kind, orthogonal), color, marker in zip(MAPS, PALETTE, MARKERS, strict=False):
                chosen = [
                    row
                    for row in found
                    if (row["features"], row["orthogonal"]) == (kind, orthogonal)
                ]
                label = f"{kind}, {'orthogonal' if orthogonal else 'independent'}"
                line = "-" if orthogonal else "--"
                one.plot(
                    [row["num_features"] for row in chosen],
                    [row["error"] for row in chosen],
                    line,
                    color=color,
                    marker=marker,
                    label=label,
                )
            one.axhline(
                found[0]["mean_value_error"],
                color=INK,
                linestyle=":",
                linewidth=1.6,
                label="mean of v",
            )
            one.set_title(f"{source[0].upper()}{source[1:]}")
            log_axis(
                one,
                "y",
                [row["error"] for row in found] + [found[0]["mean_value_error"]],
                "{:g}".format,
            )
        for one, model in zip(axes[2:], models, strict=False):
            sources = [row["source"] for row in rows if row["source"].split(",")[0] == model]
            everything = []
            for source, color, marker in zip(
                dict.fromkeys(sources), (PALETTE[4], PALETTE[5], INK), MARKERS[4:], strict=False
            ):
                chosen = [row for row in rows if row["source"] == source]
                label = source.split(", ")[1] if ", " in source else "scores as they are"
                one.plot(
                    [row["num_features"] for row in chosen],
                    [row["error"] for row in chosen],
                    color=color,
                    marker=marker,
                    label=label,
                )
                one.axhline(
                    chosen[0]["mean_value_error"], color=color, linestyle=":", linewidth=1.6
                )
                everything += [row["error"] for row in chosen] + [chosen[0]["mean_value_error"]]
            one.set_title(f"{model}, {chosen[0]['length']} tokens: positive, orthogonal")
            one.title.set_fontsize(10)
            log_axis(one, "y", everything, "{:g}".format)
        for one in axes:
            one.set_xscale("log", base=2)
            numbers = sorted({row["num_features"] for row in rows})
            one.set_xticks(numbers, [f"{number:,}" for number in numbers])
            one.minorticks_off()
            one.set_xlabel("features m")
            one.set_ylabel("relative error of the output")


if __name__ == "__main__":
    run(NAME, measure, draw)
