"""Landmarks: a few tokens that stand for all, each the mean of a segment of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.engines.engine import accumulation_dtype
from attnzoo.sequences.ordering import true_first


def segment_means(
    x: Tensor, segments: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Means of `segments` runs of real tokens, (batch, heads, segments, d), summed in float32 at
    least and returned in x's dtype; and which segments hold a token, (batch, segments) bool (None:
    all do).

    x: (batch, heads, length, d) with segments <= length. Segments are cut by rank among the real
    tokens, not by slot, so padding anywhere changes nothing: of N tokens the r-th belongs to
    segment ⌊r · segments / N⌋. With N < segments some stay empty.
    """
    dtype, length = accumulation_dtype(x.dtype), x.shape[2]
    if key_mask is None and length % segments == 0:
        return x.unflatten(2, (segments, -1)).mean(3, dtype=dtype).to(x.dtype), None
    tokens = (
        torch.full((1, 1), length, device=x.device)
        if key_mask is None
        else key_mask.sum(1, keepdim=True)
    )
    borders = -(
        -torch.arange(segments + 1, device=x.device) * tokens // segments
    )  # the first rank of each, (batch or 1, segments + 1)
    rank = borders[:, :-1, None] + torch.arange(-(-length // segments), device=x.device)
    inside = rank < borders[:, 1:, None]
    rank = rank.clamp(max=length - 1).flatten(1)
    if key_mask is None:
        found = x.index_select(2, rank[0])
    else:
        slots = true_first(key_mask, length).gather(1, rank)  # real tokens first, in order
        found = x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    found = found.unflatten(2, (segments, -1)).masked_fill(~inside[:, None, :, :, None], 0.0)
    filled = inside.sum(-1)  # (batch or 1, segments)
    means = found.sum(3, dtype=dtype) / filled.clamp(min=1)[:, None, :, None]
    return means.to(x.dtype), None if key_mask is None else filled > 0


def pseudo_inverse(kernel: Tensor, iterations: int) -> Tensor:
    """Of matrices B (..., m, m) whose rows sum to 1 or are 0: Z ← ¼ Z (13 I − B Z (15 I − B Z (7 I
    − B Z))) from Z = Bᵀ / (‖B‖₁ ‖B‖_∞)."""
    largest = kernel.sum(-2, keepdim=True).amax(-1, keepdim=True)  # ‖B‖₁; ‖B‖_∞ is 1
    inverse = kernel.mT / largest.clamp(min=torch.finfo(largest.dtype).tiny)
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    for _ in range(iterations):
        product = kernel @ inverse
        inverse = (
            0.25
            * inverse
            @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
        )
    return inverse
