"""Longformer's Figure 1: time and memory of the attention against length, exact attention, a window
looped over by diagonals, and one in chunks.

    OMP_PROC_BIND=true python -m benchmarks.papers.longformer_speed [--quick] [--redraw]

The paper's attention window of 512 (here window=257: 256 keys on each side and the query's own) and
one global token. 4 heads of 64, forward, batch 1, float32; memory: the allocator's peak of one head
beyond its inputs. The loop over diagonals is the paper's "loop", without the global token; our
`longformer` multiplies blocks of neighbouring keys, as its "chunks" do. Exact attention with A
stored, as in the paper, and as SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import interleave
from benchmarks.papers.study import MIB, Row, length_axis, panels, run, stored_attention

NAME = "longformer_speed"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
LARGEST_STORED = 8192  # tokens: A of 4 heads takes 1 GiB, and softmax takes two of them
WINDOW, HEADS = 257, 4
ROUNDS, BUDGET = 5, 8.0
LABELS = ("A stored", "SDPA", "window, by diagonals", "longformer")


def by_diagonals(q: Tensor, k: Tensor, v: Tensor, window: int = WINDOW) -> Tensor:
    """Softmax attention over the keys with |i - j| < window, one diagonal of A after another:
    (batch, heads, length, head_dim)."""
    length = q.shape[-2]
    reach = min(window, length) - 1
    spans = [
        (slice(max(0, -o), min(length, length - o)), slice(max(0, o), min(length, length + o)))
        for o in range(-reach, reach + 1)
    ]
    scores = q.new_full((*q.shape[:-1], len(spans)), float("-inf"))
    for diagonal, (rows, keys) in enumerate(spans):
        scores[..., rows, diagonal] = (q[..., rows, :] * k[..., keys, :]).sum(-1)
    weights = scores.mul_(q.shape[-1] ** -0.5).softmax(-1)
    out = torch.zeros_like(v)
    for diagonal, (rows, keys) in enumerate(spans):
        out[..., rows, :] += weights[..., rows, diagonal, None] * v[..., keys, :]
    return out


def calls(length: int, heads: int) -> dict[str, Callable[[], object]]:
    """A forward of every contender on the same inputs; A is stored where it fits."""
    q, k, v = (torch.randn(1, heads, length, 64) for _ in range(3))
    found: dict[str, Callable[[], object]] = (
        {"A stored": lambda: stored_attention(q, k, v)} if length <= LARGEST_STORED else {}
    )
    exact = attnzoo.build("standard", heads=heads, head_dim=64)
    longformer = attnzoo.build(
        "longformer", heads=heads, head_dim=64, window=WINDOW, global_tokens=1
    )
    return {
        **found,
        "SDPA": lambda: exact(q, k, v),
        "window, by diagonals": lambda: by_diagonals(q, k, v),
        "longformer": lambda: longformer(q, k, v),
    }


def measure(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.no_grad():
        for length in LENGTHS[:2] if quick else LENGTHS:
            timings = interleave(calls(length, HEADS), rounds=ROUNDS, budget=BUDGET)
            peaks = {label: peak_bytes(call) for label, call in calls(length, 1).items()}
            for label, timing in timings.items():
                yield {
                    "contender": label,
                    "length": length,
                    "seconds": timing.median,
                    "rounds": len(timing.seconds),
                    "bytes": peaks[label],
                    "over_longformer": timing.median / timings["longformer"].median,
                }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time, and memory, against length."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, MARKERS, PALETTE

    with panels(path) as axes:
        for one, field, unit in zip(axes, ("seconds", "bytes"), (1e-3, MIB), strict=True):
            for label, color, marker in zip(LABELS, (INK, *PALETTE), MARKERS, strict=False):
                found = [row for row in rows if row["contender"] == label]
                one.plot(
                    [row["length"] for row in found],
                    [row[field] / unit for row in found],
                    color=color,
                    marker=marker,
                    label=label,
                )
            length_axis(one, (row["length"] for row in rows), "tokens")
            log_axis(one, "y", [row[field] / unit for row in rows], "{:g}".format)
        axes[0].set_title("time of a forward, 4 heads")
        axes[0].set_ylabel("milliseconds")
        axes[1].set_title("peak memory of one head")
        axes[1].set_ylabel("MiB")


if __name__ == "__main__":
    run(NAME, measure, draw)
