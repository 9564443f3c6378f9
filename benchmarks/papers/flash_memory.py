"""FlashAttention's Figure 3, right: peak memory against length, tiles against a stored A.

    python -m benchmarks.papers.flash_memory [--quick] [--redraw]

One head of 64, float32; peaks are the allocator's, beyond q, k and v. "A stored" is softmax(QKᵀ)V
in three calls of torch; `flash` is the algorithm in plain torch; `standard` calls torch's kernel of
it, SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.peak_memory import peak_bytes
from benchmarks.papers.study import MIB, Row, length_axis, panels, run, stored_attention

NAME = "flash_memory"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "A stored": stored_attention,
    "flash": attnzoo.build("flash", heads=1, head_dim=64),
    "standard (SDPA)": attnzoo.build("standard", heads=1, head_dim=64),
}


def peak(attention: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, backward: bool) -> int:
    """Bytes of one forward, or of a forward and backward, gradients of q, k and v included."""
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=backward) for _ in range(3))

    def call() -> object:
        out = attention(q, k, v)
        return torch.autograd.grad(out.sum(), (q, k, v)) if backward else out

    with torch.set_grad_enabled(backward):
        return peak_bytes(call)


def measure(quick: bool) -> Iterator[Row]:
    for backward in (False, True):
        for length in LENGTHS[:3] if quick else LENGTHS:
            found = {
                label: peak(attention, length, backward) for label, attention in CONTENDERS.items()
            }
            for label, count in found.items():
                yield {
                    "contender": label,
                    "length": length,
                    "backward": backward,
                    "bytes": count,
                    "saved": found["A stored"] / count,
                }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Forward, then forward and backward."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import INK, MARKERS, PALETTE

    with panels(path) as axes:
        for one, backward in zip(axes, (False, True), strict=True):
            for label, color, marker in zip(CONTENDERS, (INK, *PALETTE), MARKERS, strict=False):
                found = [
                    row for row in rows if row["contender"] == label and row["backward"] == backward
                ]
                one.plot(
                    [row["length"] for row in found],
                    [row["bytes"] / MIB for row in found],
                    color=color,
                    marker=marker,
                    label=label,
                )
            length_axis(one, (row["length"] for row in rows), "tokens")
            log_axis(one, "y", [row["bytes"] / MIB for row in rows], "{:g}".format)
            one.set_ylabel("peak, MiB")
            one.set_title("forward and backward" if backward else "forward")


if __name__ == "__main__":
    run(NAME, measure, draw)
