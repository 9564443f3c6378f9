"""Nyströmformer's Table 1, which Longformer's Figure 1 agrees with: time and memory of one
attention module against length.

    OMP_PROC_BIND=true python -m benchmarks.papers.nystromformer_speed [--quick] [--redraw]

The table's own settings: Linformer with k = 256, Longformer with 257 keys (here `sliding_window`,
window=129: the same keys; neither has global tokens), 64 and 32 landmarks. 4 heads of 64, forward,
batch 1, float32; memory: the allocator's peak of one head beyond its inputs. Exact attention with A
stored, as in the paper, and as SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import interleave
from attnzoo.registry import spec_of
from benchmarks.papers.study import Row, length_axis, panels, run, stored_attention

NAME = "nystromformer_speed"
LENGTHS = (512, 1024, 2048, 4096, 8192)
ROUNDS, BUDGET = 7, 6.0
#: label: variant and options
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SDPA": ("standard", {}),
    "Linformer-256": ("linformer", {"rank": 256}),
    "Longformer-257": ("sliding_window", {"window": 129}),
    "Nyströmformer-64": ("nystromformer", {"num_landmarks": 64}),
    "Nyströmformer-32": ("nystromformer", {"num_landmarks": 32}),
}
#: Table 1 of the paper at the lengths above: times faster, and times less memory, than exact
#: attention with A stored.
PAPER_TIME = {
    "Linformer-256": (1.1, 1.8, 3.6, 6.2, 13.8),
    "Longformer-257": (0.3, 0.5, 1.0, 1.8, 4.3),
    "Nyströmformer-64": (1.1, 1.8, 3.6, 5.6, 12.7),
    "Nyströmformer-32": (1.2, 1.9, 3.7, 5.9, 13.4),
}
PAPER_MEMORY = {
    "Linformer-256": (1.3, 2.3, 4.2, 7.2, 16.1),
    "Longformer-257": (1.7, 2.9, 5.3, 10.0, 22.5),
    "Nyströmformer-64": (1.5, 3.0, 5.8, 11.5, 22.8),
    "Nyströmformer-32": (2.1, 3.8, 7.1, 13.6, 26.7),
}


def calls(length: int, heads: int) -> dict[str, Callable[[], object]]:
    """A forward of every contender on the same inputs, "A stored" first."""
    q, k, v = (torch.randn(1, heads, length, 64) for _ in range(3))
    found: dict[str, Callable[[], object]] = {"A stored": lambda: stored_attention(q, k, v)}
    for label, (name, options) in CONTENDERS.items():
        limits = {"max_length": length} if spec_of(name).needs_max_length else {}
        attention = attnzoo.build(name, heads=heads, head_dim=64, **limits, **options).eval()
        found[label] = lambda attention=attention: attention(q, k, v)
    return found


def measure(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.no_grad():
        for length in LENGTHS[:2] if quick else LENGTHS:
            timings = interleave(calls(length, 4), rounds=ROUNDS, budget=BUDGET)
            peaks = {label: peak_bytes(call) for label, call in calls(length, 1).items()}
            for label, timing in timings.items():
                yield {
                    "contender": label,
                    "length": length,
                    "seconds": timing.median,
                    "rounds": len(timing.seconds),
                    "bytes": peaks[label],
                    "faster": timings["A stored"].median / timing.median,
                    "faster_than_sdpa": timings["SDPA"].median / timing.median,
                    "memory_saved": peaks["A stored"] / peaks[label],
                }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Times faster and times less memory than with A stored: ours as lines, the paper's as hollow
    marks, dotted."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, MARKERS, PALETTE

    with panels(path) as axes:
        for one, field, paper in zip(
            axes, ("faster", "memory_saved"), (PAPER_TIME, PAPER_MEMORY), strict=True
        ):
            for label, color, marker in zip(CONTENDERS, (INK, *PALETTE), MARKERS, strict=False):
                found = [row for row in rows if row["contender"] == label]
                one.plot(
                    [row["length"] for row in found],
                    [row[field] for row in found],
                    color=color,
                    marker=marker,
                    label=label,
                )
                if label in paper:
                    one.plot(
                        LENGTHS,
                        paper[label],
                        linestyle=":",
                        color=color,
                        marker=marker,
                        markerfacecolor="none",
                        linewidth=1,
                    )
            length_axis(one, LENGTHS, "tokens")
            log_axis(
                one,
                "y",
                [row[field] for row in rows] + [x for numbers in paper.values() for x in numbers],
                "{:g}×".format,
            )
            one.set_title("times faster" if field == "faster" else "times less memory")
            one.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes[0].plot(
            [],
            [],
            ":",
            color=INK,
            marker="o",
            markerfacecolor="none",
            linewidth=1,
            label="the paper (hollow, dotted)",
        )


if __name__ == "__main__":
    run(NAME, measure, draw)
