"""Queries, keys and values drawn from a normal distribution whose scores have a stated spread, for
machines without the models."""

from __future__ import annotations

import torch

from attnzoo.fidelity.comparison_rows import Sample
from attnzoo.fidelity.metrics import score_std


def synthetic_sample(
    length: int,
    *,
    is_causal: bool,
    spread: float,
    heads: int = 3,
    kv_heads: int = 3,
    head_dim: int = 64,
    seed: int = 0,
    reason: str = "",
) -> Sample:
    """Independent normal q, k and v, (1, heads or kv_heads, length, head_dim), with q·k/√head_dim
    of standard deviation `spread`.

    `score_std` of the sample is the measured one.

    reason: why it stands in for a real model, added to `text`.
    Raises ValueError when spread is not positive.
    """
    if not spread > 0:
        raise ValueError(
            f"spread={spread} must be positive: it is the standard deviation of the scores"
        )
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, length, head_dim, generator=generator) * spread**0.5
    k, v = (torch.randn(1, kv_heads, length, head_dim, generator=generator) for _ in range(2))
    k = k * spread**0.5
    text = f"normal q, k and v with score standard deviation {spread:g}, seed {seed}"
    return Sample(
        model=f"synthetic std {spread:g}",
        is_causal=is_causal,
        length=length,
        layers=("synthetic",),
        heads=tuple(range(heads)),
        score_std=score_std(q, k, is_causal=is_causal),
        q=q,
        k=k,
        v=v,
        text=f"{text} ({reason})" if reason else text,
    )
