"""The positions of a layer's tokens: they count from the first real token of a sample, or of a
piece of a packed row, and a padded slot behind it keeps its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.call_checks import check_segments
from attnzoo.eager import can_look
from attnzoo.sequences.ordering import running_maximum
from attnzoo.sequences.packing import order_of
from attnzoo.sequences.padding import fetched, leading


def positions_of(q: Tensor, k: Tensor, key_mask: Tensor | None, segments: Tensor | None) -> Tensor:
    """The positions of the slots of a call, the last of which is that of its last query and of its
    last key.

    q, k: (batch, heads, length, head_dim)
    key_mask: (batch, key_length) bool, True = a real token
    segments: (batch, key_length) integer
    returns: (length,), or (batch, length) where there are masks or segments; length is the greater
        of the two
    """
    key_length = k.shape[2]
    ahead = max(q.shape[2] - key_length, 0)  # queries before every key
    slots = torch.arange(-ahead, key_length, device=k.device)
    if segments is None:
        return slots if key_mask is None else slots - leading(key_mask)[:, None]
    check_segments(Call(q, k, k, is_causal=True, segments=segments))
    order = order_of(segments) if can_look(segments, may_stall=True) else None
    if order is None:
        return F.pad(_in_pieces(key_mask, segments), (ahead, 0))
    mask = None if key_mask is None else fetched(key_mask, order, 1)
    together = _in_pieces(mask, fetched(segments, order, 1))
    return F.pad(fetched(together, order.argsort(1), 1), (ahead, 0))


def _in_pieces(key_mask: Tensor | None, segments: Tensor) -> Tensor:
    """Positions in pieces whose tokens stand together, (batch, length)."""
    slots = torch.arange(segments.shape[1], device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    start = running_maximum(torch.where(begins, slots, 0))
    if key_mask is None:
        return slots - start
    before = key_mask.cumsum(1) - key_mask.long()  # real tokens before a slot
    is_first = key_mask & (before == before.gather(1, start))
    origin = running_maximum(torch.where(is_first, slots, 0))
    return slots - torch.maximum(origin, start)
