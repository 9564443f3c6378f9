"""Linear attention's constant time and memory for each generated token, against softmax that keeps
a cache and softmax that has none.

    OMP_PROC_BIND=true python -m benchmarks.papers.linear_decoding [--quick] [--redraw]

One attention of 8 heads of 32, as in the paper's image models (784 and 3,072 tokens), float32,
batch 1: one token behind a past of n random ones. Without a cache every token computes all rows
again, which is what the paper's speed-up is measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.timing import interleave, wall_clock
from benchmarks.papers.study import MIB, Row, length_axis, panels, run

NAME = "linear_decoding"
LENGTHS = (196, 784, 3072, 8192, 32768)
RECOMPUTED_LENGTHS = LENGTHS[:3]
HEADS, HEAD_DIM, CHUNK = 8, 32, 512
ROUNDS, BUDGET = 101, 5.0
LABELS = ("linear", "softmax, cache", "softmax, no cache")


def tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v."""
    q, k, v = torch.randn(3, 1, HEADS, count, HEAD_DIM)
    return q, k, v


class Decoder:
    """An attention that takes one more token with every call; it starts with a past of `length`
    random ones."""

    def __init__(self, variant: str, length: int) -> None:
        self.attention = attnzoo.build(variant, heads=HEADS, head_dim=HEAD_DIM)
        self.state: Any = self.attention.init_state(1)
        for start in range(0, length, CHUNK):
            self._take(*tokens(min(CHUNK, length - start)))
        self.next = tokens(1)

    def _take(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        _, self.state = self.attention.step(q, k, v, self.state)

    def __call__(self) -> None:
        self._take(*self.next)

    def read_bytes(self) -> int:
        """Of the past, what the next token reads."""
        return 4 * self.state.elements()


def recomputation(length: int) -> Callable[[], object]:
    """A causal forward over all tokens."""
    attention = attnzoo.build("standard", heads=HEADS, head_dim=HEAD_DIM)
    q, k, v = tokens(length)
    return lambda: attention(q, k, v, is_causal=True)


def following(call: Callable[[], object]) -> float:
    """Seconds of a call right after another of its own: what the other contenders left in the
    processor's caches is not its fault."""
    call()
    return wall_clock(call)


def measure(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.no_grad():
        for length in LENGTHS[:3] if quick else LENGTHS:
            linear, cached = Decoder("linear", length), Decoder("standard", length)
            read = {"linear": linear.read_bytes(), "softmax, cache": cached.read_bytes()}
            calls: dict[str, Callable[[], object]] = {"linear": linear, "softmax, cache": cached}
            if length in RECOMPUTED_LENGTHS:
                calls["softmax, no cache"] = recomputation(length)
            timings = interleave(
                calls, rounds=ROUNDS, warmups=3, budget=BUDGET, stopwatch=following
            )
            for label, timing in timings.items():
                yield {
                    "contender": label,
                    "length": length,
                    "seconds": timing.median,
                    "quartiles": list(timing.quartiles),
                    "rounds": len(timing.seconds),
                    "over_linear": timing.median / timings["linear"].median,
                    "read_bytes": read.get(label),
                }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time of a token, and bytes of the past that it reads."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, MARKERS, PALETTE

    with panels(path) as axes:
        for one, field, unit in zip(axes, ("seconds", "read_bytes"), (1e-3, MIB), strict=True):
            for label, color, marker in zip(
                LABELS, (PALETTE[0], INK, PALETTE[1]), MARKERS, strict=False
            ):
                found = [
                    row for row in rows if row["contender"] == label and row[field] is not None
                ]
                if found:
                    one.plot(
                        [row["length"] for row in found],
                        [row[field] / unit for row in found],
                        color=color,
                        marker=marker,
                        label=label,
                    )
            length_axis(one, (row["length"] for row in rows), "tokens before it")
            log_axis(
                one,
                "y",
                [row[field] / unit for row in rows if row[field] is not None],
                "{:g}".format,
            )
        axes[0].set_title("one token of one attention")
        axes[0].set_ylabel("milliseconds")
        axes[1].set_title("past that a token reads")
        axes[1].set_ylabel("MiB")


if __name__ == "__main__":
    run(NAME, measure, draw)
