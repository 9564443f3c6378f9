"""Landmarks: a few tokens that stand for all, each the mean of a segment of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.engines.engine import accumulation_dtype
from attnzoo.sequences.ordering import true_first


def segment_means(
    x: Tensor, segments: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Means over segments of consecutive real tokens.

    Segments are cut by counting real tokens, not slots, so that padding anywhere changes nothing:
    of N real tokens the r-th belongs to segment ⌊r · segments / N⌋. With N < segments some segments
    stay empty. Sums are in float32 at least.

    x: (batch, heads, length, d)
    segments: number of segments, at most length
    key_mask: (batch, length) bool, True for real tokens; None: all are real

    Returns the means, (batch, heads, segments, d) in x's dtype, and which segments hold a token,
    (batch, segments) bool, or None when all do.
    """
    dtype, length = accumulation_dtype(x.dtype), x.shape[2]
    if key_mask is None and length % segments == 0:
        return x.unflatten(2, (segments, -1)).mean(3, dtype=dtype).to(x.dtype), None
    tokens = (
        torch.full((1, 1), length, device=x.device)
        if key_mask is None
        else key_mask.sum(1, keepdim=True)
    )
    # The number, among real tokens, of the first one of each segment, (batch or 1, segments + 1).
    borders = -(-torch.arange(segments + 1, device=x.device) * tokens // segments)
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
    """The approximate pseudo-inverse Z of matrices B, by the iteration of Nyströmformer (Xiong et
    al. 2021).

        Z ← ¼ Z (13 I − B Z (15 I − B Z (7 I − B Z))),    from Z = Bᵀ / (‖B‖₁ ‖B‖_∞)

    kernel: (..., m, m), the matrices B, whose rows sum to 1 or are 0
    iterations: number of steps
    """
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
