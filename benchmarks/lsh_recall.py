"""How many of softmax's top keys locality-sensitive hashing finds, against hash rounds, on queries
and keys of real models.

    python benchmarks/lsh_recall.py [--output benchmarks/results/lsh_recall.jsonl] [--figure
        docs/figures/lsh-recall.png]

SmolLM2-135M (causal, 2,048 tokens) and MiniLM-L6 (512 tokens) read Hamlet; the first, middle and
last layers and heads. A row's top keys are those of largest q·k among those that it may see; rows
of the decoder count from the 129th on. `reformer` with num_buckets = 2·length/chunk_size, as in the
paper, queries and keys hashed apart; means over 3 draws. Beside each recall stands what equally
many keys find, row by row: the nearest, or random ones. And once more with queries in the keys'
place, each one's own left out, as share_qk hashes, which no such model was trained for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.environment import environment
from attnzoo.call import Call, repeat_heads
from attnzoo.fidelity.comparison_rows import Sample
from attnzoo.fidelity.pretrained import SOURCES
from attnzoo.fidelity.samples import load_samples
from attnzoo.variants.reformer.bucket_softmax import BucketSoftmax

HASHES, TOP, SEEDS = (1, 2, 4, 8, 16), (1, 8, 32), (0, 1, 2)
LENGTHS = {"SmolLM2-135M": 2048, "MiniLM-L6": 512}
CHUNK_SIZE, FIRST_ROW = 64, 128  # of a causal model


def scores_of(sample: Sample, shared: bool) -> Tensor:
    """Scores of the rows that count, (layers, heads, rows, keys), -inf where a key is hidden.
    shared: of queries with queries."""
    k = sample.q if shared else repeat_heads(sample.k, sample.q.shape[1] // sample.k.shape[1])
    scores = sample.q @ k.mT * sample.q.shape[3] ** -0.5
    if sample.is_causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1 if shared else 0),
            float("-inf"),
        )
    elif shared:
        scores = scores.masked_fill(torch.eye(sample.length, dtype=torch.bool), float("-inf"))
    return scores[:, :, FIRST_ROW if sample.is_causal else 0 :]


def recalls(seen: Tensor, scores: Tensor) -> dict[str, float]:
    """Share of the top keys that are seen, by how many there are, and of softmax's mass."""
    found = {
        f"top_{count}": seen.gather(-1, scores.topk(count).indices).double().mean().item()
        for count in TOP
    }
    return {**found, "mass": (scores.softmax(-1) * seen).sum(-1).mean().item()}


def measure(sample: Sample, num_hashes: int, seed: int, shared: bool) -> dict[str, Any]:
    """Recall of one draw, of the nearest keys and of random ones, equally many row by row."""
    num_buckets = 2 * sample.length // CHUNK_SIZE
    heads, head_dim = sample.q.shape[1], sample.q.shape[3]
    attn = attnzoo.build(
        "reformer",
        heads=heads,
        head_dim=head_dim,
        num_buckets=num_buckets,
        num_hashes=num_hashes,
        chunk_size=CHUNK_SIZE,
        seed=seed,
    )
    scores = scores_of(sample, shared)
    first = sample.length - scores.shape[2]
    assert isinstance(attn.engine, BucketSoftmax)
    seen = attn.engine.support(
        Call(sample.q, sample.q if shared else sample.k, sample.v, is_causal=sample.is_causal)
    )[:, :, first:]
    visible = scores > float("-inf")
    seen = seen & visible
    keys = seen.sum(-1, keepdim=True)
    distance = torch.arange(first, sample.length)[:, None] - torch.arange(sample.length)
    near = (distance.abs() + (1e-3 * (distance < 0))).where(visible, float("inf"))
    nearest = near.argsort(-1).argsort(-1) < keys
    share = (keys / visible.sum(-1, keepdim=True)).mean().item()
    return {
        "keys": keys.double().mean().item(),
        "share_of_keys": share,
        "reformer": recalls(seen, scores),
        "nearest": recalls(nearest, scores),
        "random": dict.fromkeys((*(f"top_{count}" for count in TOP), "mass"), share),
    }


def mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of numbers that are nested alike, rounded to four digits."""
    first = rows[0]
    return {
        name: mean([row[name] for row in rows])
        if isinstance(value, dict)
        else round(sum(row[name] for row in rows) / len(rows), 4)
        for name, value in first.items()
    }


def draw(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """A panel for each model and way of hashing: recall over hash rounds, a colour for each size of
    the top, dotted for the nearest keys."""
    import matplotlib

    from attnzoo.report.style import INK, MARKERS, PALETTE, RC, new_figure

    panels = list(dict.fromkeys((row["model"], row["shared"]) for row in rows))
    with matplotlib.rc_context({**RC, "figure.facecolor": "white"}):
        figure = new_figure(3.4 * len(panels), 3.9)
        for axes, (model, shared) in zip(
            figure.subplots(1, len(panels), sharey=True), panels, strict=True
        ):
            some = [row for row in rows if (row["model"], row["shared"]) == (model, shared)]
            rounds = [row["num_hashes"] for row in some]
            for count, color, marker in zip(TOP, PALETTE, MARKERS, strict=False):
                name = f"top_{count}"
                axes.plot(
                    rounds,
                    [row["reformer"][name] for row in some],
                    color=color,
                    marker=marker,
                    label=f"hashing, top {count}",
                )
                axes.plot(
                    rounds,
                    [row["nearest"][name] for row in some],
                    color=color,
                    linestyle=":",
                    label=f"nearest keys, top {count}",
                )
            axes.plot(
                rounds,
                [row["share_of_keys"] for row in some],
                color=INK,
                linestyle="--",
                label="random keys, as many",
            )
            axes.set_xscale("log", base=2)
            axes.set_xticks(rounds, [str(count) for count in rounds])
            axes.set_ylim(0, 1.02)
            axes.set_xlabel("hash rounds")
            axes.set_title(
                f"{model}, {some[0]['length']:,} "
                f"tokens\n{'q·q, itself left out' if shared else 'q·k'}"
            )
        figure.axes[0].set_ylabel("share of softmax's top keys seen")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4)
        figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Recall of softmax's top keys by locality-sensitive hashing."
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lsh_recall.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/lsh-recall.png"))
    arguments = parser.parse_args()
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    rows = []
    for model in SOURCES:
        sample = load_samples([LENGTHS[model]], models=[model])[-1]
        for shared in (False, True):
            for num_hashes in HASHES:
                found = mean([measure(sample, num_hashes, seed, shared) for seed in SEEDS])
                rows.append(
                    {
                        "model": sample.model,
                        "length": sample.length,
                        "shared": shared,
                        "num_hashes": num_hashes,
                        **found,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    arguments.output.write_text(
        "".join(json.dumps({**row, "environment": where}) + "\n" for row in rows)
    )
    draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
