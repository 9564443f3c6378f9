"""Masks of one truth value for every query and key, read as what sub-quadratic attention takes:
causality, padding and packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.eager import holds_anywhere
from attnzoo.sequences.ordering import running_maximum


@dataclass(frozen=True)
class ReadMask:
    """What a mask says: the arguments of a call of an attention.

    key_mask: (batch, key_length) bool, or None where it hides no key from all.
    segments: (batch, key_length) integer, or None where all keys are of one piece.
    """

    key_mask: Tensor | None
    is_causal: bool
    segments: Tensor | None


def visible_keys(mask: Tensor) -> Tensor | None:
    """A bool mask (True = attend), or an additive one of 0 and of numbers too low to leave a weight
    (torch.finfo(...).min, -inf), as a bool one; None of any other."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(torch.float16).min
    return None if holds_anywhere(~hidden & (mask != 0)) else ~hidden


def read_mask(visible: Tensor, window: int | None = None) -> ReadMask | None:
    """What a mask says, or None where it is more than causality, padding, packing and the window.

    visible: (batch, heads or 1, query_length, key_length) bool, True = attend
    window: query i may see key j where |i - j| < window only, as the attention knows itself

    The rows of padded slots may be any. Pieces are told by neighbours that do not see each other.
    """
    whole = visible[:, 0]
    offset = whole.shape[2] - whole.shape[1]
    if offset < 0 or holds_anywhere(visible != visible[:, :1]):
        return None
    slots = torch.arange(whole.shape[2], device=whole.device)
    past = slots <= slots[offset:, None]
    is_causal = not holds_anywhere(whole & ~past)
    keys = whole.any(1)
    last = running_maximum(torch.where(keys, slots, -1))  # the last token up to a slot
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)[:, offset:]
    goes_on = whole.gather(2, before.clamp(min=0)[..., None])[..., 0] | (before < 0)
    begins = torch.cat([torch.zeros_like(keys[:, :offset]), ~goes_on & keys[:, offset:]], 1)
    segments = begins.cumsum(1)
    seen = keys[:, None] & (segments[:, offset:, None] == segments[:, None])
    if is_causal:
        seen = seen & past
    rows = keys[:, offset:, None]
    if holds_anywhere((seen != whole) & rows):
        near = (slots - slots[offset:, None]).abs() < (window or 0)
        if window is None or holds_anywhere(((seen & near) != whole) & rows):
            return None
    return ReadMask(
        keys if holds_anywhere(~keys) else None,
        is_causal,
        segments if holds_anywhere(begins) else None,
    )
