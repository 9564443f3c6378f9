"""Where the prose of the article of `attnzoo.cost.article` contradicts its own tables."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.cost.article import (
    attention_memory,
    layer_breakdown,
    longest_matrices,
    path_length,
    variant_complexity,
)
from attnzoo.cost.hardware import GPU
from attnzoo.cost.model_sizes import TransformerModel


@dataclass(frozen=True)
class Contradiction:
    """One place where they differ.

    prose: what the prose says.
    table: what the table's formula gives.
    """

    prose: str
    table: str


def contradictions(
    small: TransformerModel, small_gpu: GPU, large_gpu: GPU
) -> tuple[Contradiction, ...]:
    """Every place where the prose says something else than the tables.

    small: GPT-2 Small.
    small_gpu, large_gpu: of 24 GB and 80 GB.
    """
    gib = {row["n"]: row["gib"] for row in attention_memory([small], (512, 2048, 8192)).rows}
    shares = {row["n"]: row for row in layer_breakdown((256, 1024, 4096)).rows}
    efficiency = path_length((128,)).rows[0]["efficiency"]
    longest = [longest_matrices(small, gpu.memory_bytes) for gpu in (small_gpu, large_gpu)]
    one_layer = [
        longest_matrices(TransformerModel("one layer", small.d, small.heads, 1), gpu.memory_bytes)
        for gpu in (small_gpu, large_gpu)
    ]
    speedup = {row["variant"].split(",")[0]: row["speedup"] for row in variant_complexity().rows}
    return (
        Contradiction(
            "27K and 50K tokens fit 24 GB and 80 GB",
            f"{longest[0]:,} and {longest[1]:,}; the prose is near what a single layer would allow "
            f"({one_layer[0]:,} and {one_layer[1]:,})",
        ),
        Contradiction("the efficiency is 252 at n = 128", f"{efficiency:.0f}"),
        Contradiction("the feed-forward network is 69% at n = 256", f"{shares[256]['ffn']:.1f}%"),
        Contradiction(
            "attention is 17% at n = 1,024 and 45% at n = 4,096",
            f"{shares[1024]['attention']:.1f}% and {shares[4096]['attention']:.1f}%",
        ),
        Contradiction(
            "GPT-2 Small needs about 0.2 GB at n = 512 and 3 GB at n = 2,048",
            f"{gib[512]:.2f} and {gib[2048]:.2f} GiB",
        ),
        Contradiction(
            "1.5 GB and 18 GB",
            f"the nearest entries are {gib[2048]:.2f} GiB (n = 2,048) and {gib[8192]:.2f} GiB (n = "
            "8,192)",
        ),
        Contradiction(
            "memory grows 16-fold from n = 512 to n = 2,048",
            f"{gib[2048] / gib[512]:.1f}-fold: q, k, v and the output grow only 4-fold",
        ),
        Contradiction(
            "sparse and linear attention gain similarly",
            f"{speedup['sparse']:.0f}× and {speedup['linear']:.0f}×",
        ),
        Contradiction(
            "Sparse Transformers learn their positions",
            "no number: they fix them in advance (Child et al. 2019, arXiv:1904.10509)",
        ),
    )
