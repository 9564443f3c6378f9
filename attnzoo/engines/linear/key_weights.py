"""The weight with which a key is written into the sums over keys and values.

A feature map may give a key as `features · exp(log_scale)`, because the whole may be too large for
a floating-point number. A row therefore weighs its keys by exp(log_scale_j - m_i), where m_i is the
largest log_scale up to row i: no later key, however large, can push an earlier row out of range.
The sums are held divided by exp of the largest log_scale so far.
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
    """The factors that log_scale gives to chunks of tokens that are computed side by side.

    log_scale: (batch, kv_heads, chunks, length), -inf for a padded key; None where keys have none
    earlier: (batch, kv_heads), the largest before the first chunk; None when there is no key
    group: query heads that share a key head
    remember: whether the sums after the chunks are wanted

    Returns the factors, and the largest log_scale up to the end of the last chunk, (batch,
    kv_heads), or None where keys have none.
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
    # A key after the row may be larger than the row's maximum: without the clamp its exponential,
    # which `tril` removes, could be inf, and its gradient NaN.
    exponents = (log_scale[..., None, :] - finite(running)[..., None]).clamp_(max=0)
    weights = weights_of(log_scale, largest) if remember else None
    return Worth(exp_(exponents).tril(), carry, weights, shrink), largest[..., -1]


def write_keys(
    log_scale: Tensor | None, earlier: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The factors of keys that are only added to the sums.

    log_scale: (batch, kv_heads, length), -inf for a padded key; None where keys have none
    earlier: (batch, kv_heads), the largest before these keys; None when there is no key

    Returns the weight of each key, (batch, kv_heads, length); what the earlier sums are multiplied
    by, (batch, kv_heads); and the largest log_scale so far, (batch, kv_heads). None stands for 1,
    and for no log_scale.
    """
    if log_scale is None:
        return None, None, None
    largest, shrink = log_scale.detach().amax(-1), None
    if earlier is not None:
        largest = torch.maximum(largest, earlier)
        shrink = (earlier - finite(largest)).exp()
    return weights_of(log_scale, largest), shrink, largest


def weights_of(log_scale: Tensor, largest: Tensor) -> Tensor:
    """exp(log_scale - largest), of the shape of log_scale.

    log_scale: (..., length)
    largest: (...), the largest of the last dimension or of more keys
    """
    return exp_(log_scale - finite(largest)[..., None])


def finite(stabiliser: Tensor) -> Tensor:
    """The maximum that is subtracted from each log_scale, with -inf (no key yet) replaced by the
    lowest finite number, so that -inf minus it is -inf and not NaN."""
    return stabiliser.clamp(min=torch.finfo(stabiliser.dtype).min)
