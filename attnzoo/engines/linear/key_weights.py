"""How heavily a key is written into the sums.

A feature map gives a key as `features · exp(log_scale)`. A row weighs its keys by exp(log_scale_j -
m_i) under its own running maximum m_i, so no later key, however large, can push an earlier row out
of range (rule 5), and the sums are held divided by exp of the maximum so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.engines.exponential import exp_
from attnzoo.engines.linear.decay import Worth
from attnzoo.sequences.ordering import running_maximum


def write_chunks(
    log_scale: Tensor | None, earlier: Tensor | None, group: int, *, remember: bool
) -> tuple[Worth, Tensor | None]:
    """Factors of chunks, and the largest log_scale after the last of them.

    log_scale: (batch, kv_heads, chunks, length), -inf for a padded key; None where keys have none.
    earlier: (batch, kv_heads), the largest before the first chunk; None when there is no key.
    group: rows that share a key. remember: whether the sums after the chunks are wanted.
    """
    if log_scale is None:
        return Worth(), None
    running = running_maximum(log_scale.detach())
    largest = running[..., -1]  # after each chunk
    carry = shrink = None
    if earlier is not None:
        largest = running_maximum(torch.maximum(largest, earlier[..., None]))
        before = torch.cat([earlier[..., None], largest[..., :-1]], -1)
        running = torch.maximum(running, before[..., None])
        of_rows = (before[..., None] - finite(running)).exp()[..., None, :]
        carry = of_rows.expand(-1, -1, -1, group, -1).flatten(3)[..., None]
        shrink = (before - finite(largest)).exp() if remember else None
    # Clamped, since a later key may be larger.
    exponents = (log_scale[..., None, :] - finite(running)[..., None]).clamp_(max=0)
    weights = weights_of(log_scale, largest) if remember else None
    return Worth(exp_(exponents).tril(), carry, weights, shrink), largest[..., -1]


def write_keys(
    log_scale: Tensor | None, earlier: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`weights` and `shrink` of keys whose rows nobody reads, and the largest log_scale after
    them. log_scale: (batch, kv_heads, length)."""
    if log_scale is None:
        return None, None, None
    largest, shrink = log_scale.detach().amax(-1), None
    if earlier is not None:
        largest = torch.maximum(largest, earlier)
        shrink = (earlier - finite(largest)).exp()
    return weights_of(log_scale, largest), shrink, largest


def weights_of(log_scale: Tensor, largest: Tensor) -> Tensor:
    """exp(log_scale - largest), (..., length) of (..., length) and (...)."""
    return exp_(log_scale - finite(largest)[..., None])


def finite(stabiliser: Tensor) -> Tensor:
    """-inf (no key yet) becomes the lowest finite number, so that -inf - stabiliser is -inf and not
    NaN."""
    return stabiliser.clamp(min=torch.finfo(stabiliser.dtype).min)
