"""Linformer's Table 3: time and memory saved over n and k, of the attention alone and of a whole
encoder layer.

    OMP_PROC_BIND=true python -m benchmarks.papers.linformer_speed [--quick] [--redraw]

Attention: 4 heads of 64. Layer: the base model's, width 768, 12 heads, feed-forward 3,072. Forward,
batch 1, float32. Exact attention is timed twice: with A stored, as a Transformer of 2020 had it,
and as SDPA. Memory: the allocator's peak of one head beyond its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import interleave
from benchmarks.papers.study import Row, length_axis, panels, run, stored_attention

NAME = "linformer_speed"
LENGTHS, LAYER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384), (512, 1024, 2048, 4096, 8192)
LARGEST_STORED = 4 * 8192**2  # numbers in A: 1 GiB, and softmax takes two of them
RANKS = (128, 256)
ROUNDS, BUDGET = 5, 4.0
#: Table 3 of the paper, by k: times faster, and times less memory, at the lengths above.
PAPER_TIME = {128: (1.5, 1.7, 2.6, 3.4, 5.5, 8.6), 256: (1.3, 1.6, 2.4, 3.2, 5.0, 7.8)}
PAPER_MEMORY = {128: (1.7, 3.0, 6.1, 14, 28, 56), 256: (1.5, 2.9, 5.6, 13, 26, 48)}


Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """A pre-norm encoder layer of the base model's size around any attention."""

    def __init__(self, core: Core, heads: int = 12, width: int = 768) -> None:
        super().__init__()
        self.core, self.heads = core, heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.project(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        x = x + self.out(self.core(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


def contenders(length: int, heads: int) -> dict[str, Core]:
    """Exact attention, with A stored where it fits in a GiB, and Linformer at each k."""
    stored: dict[str, Core] = (
        {"A stored": stored_attention} if heads * length**2 <= LARGEST_STORED else {}
    )
    options = {"max_length": length, "sharing": "layerwise"}
    ranks = {
        f"k={rank}": attnzoo.build(
            "linformer", heads=heads, head_dim=64, rank=rank, **options
        ).eval()
        for rank in RANKS
    }
    return {**stored, "SDPA": attnzoo.build("standard", heads=heads, head_dim=64), **ranks}


def attentions(length: int, heads: int) -> dict[str, Callable[[], object]]:
    """A forward of each attention alone."""
    q, k, v = (torch.randn(1, heads, length, 64) for _ in range(3))
    return {
        label: lambda core=core: core(q, k, v) for label, core in contenders(length, heads).items()
    }


def layers(length: int) -> dict[str, Callable[[], object]]:
    """A forward of a layer with each attention."""
    x = torch.randn(1, length, 768)
    built = {label: Layer(core).eval() for label, core in contenders(length, 12).items()}
    return {label: lambda layer=layer: layer(x) for label, layer in built.items()}


def measure(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.no_grad():
        for what, lengths in (("attention", LENGTHS), ("layer", LAYER_LENGTHS)):
            for length in lengths[:2] if quick else lengths:
                timings = interleave(
                    attentions(length, 4) if what == "attention" else layers(length),
                    rounds=ROUNDS,
                    budget=BUDGET,
                )
                for label, timing in timings.items():
                    yield {
                        "what": f"time of the {what}",
                        "length": length,
                        "contender": label,
                        "seconds": timing.median,
                        "rounds": len(timing.seconds),
                    }
        for length in LENGTHS[:2] if quick else LENGTHS:
            for label, call in attentions(length, 1).items():
                yield {
                    "what": "memory of one head",
                    "length": length,
                    "contender": label,
                    "bytes": peak_bytes(call),
                }


def saved(rows: Sequence[Row], what: str, field: str, over: str, rank: int) -> dict[int, float]:
    """How many times less k=rank takes than `over`, by length."""
    found = {(row["length"], row["contender"]): row[field] for row in rows if row["what"] == what}
    return {
        length: value / found[length, f"k={rank}"]
        for (length, label), value in found.items()
        if label == over
    }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Times faster than exact attention, and times less memory, beside the paper's table."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, MARKERS, PALETTE

    with panels(path) as axes:
        series = [(what, over) for what in ("attention", "layer") for over in ("A stored", "SDPA")]
        for one, field, paper in zip(
            axes, ("seconds", "bytes"), (PAPER_TIME, PAPER_MEMORY), strict=True
        ):
            one.plot(LENGTHS, paper[128], color=INK, linewidth=2.4, label="the paper")
            everything = [1.0, *paper[128]]
            for (what, over), color, marker in zip(series, PALETTE, MARKERS, strict=False):
                where = f"time of the {what}" if field == "seconds" else "memory of one head"
                if field == "bytes" and what == "layer":
                    continue
                found = saved(rows, where, field, over, 128)
                one.plot(
                    list(found),
                    list(found.values()),
                    color=color,
                    marker=marker,
                    label=f"{what}, over {over}",
                )
                everything += found.values()
            one.axhline(1, color=INK, linewidth=0.8, linestyle=":")
            length_axis(one, LENGTHS, "tokens")
            log_axis(one, "y", everything, "{:g}×".format)
            one.set_title(
                "times faster than exact attention, k = 128"
                if field == "seconds"
                else "times less memory, k = 128"
            )


if __name__ == "__main__":
    run(NAME, measure, draw)
