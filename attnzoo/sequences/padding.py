"""Where the real tokens of padded samples stand, and how a sample's leading padding is moved behind
its end (rule 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.sequences.ordering import true_first


def first_real(key_mask: Tensor, count: int) -> Tensor:
    """The first `count` real tokens of every sample, (batch, length) bool."""
    return key_mask & (key_mask.cumsum(1) <= count)


def leading(key_mask: Tensor) -> Tensor:
    """Padded slots before the first real token of every sample, (batch,); 0 where none is real."""
    return key_mask.to(torch.uint8).argmax(1)


def ends(key_mask: Tensor) -> Tensor:
    """One more than the slot of the last real token of every sample, (batch,); 0 where none is
    real."""
    slots = torch.arange(1, key_mask.shape[1] + 1, device=key_mask.device)
    return (key_mask * slots).amax(1)


def slots_of(mask: Tensor, count: int) -> Tensor:
    """Where the True of every row of (batch, length) stand, ascending, (batch, count); other slots,
    each once, where there are fewer."""
    return true_first(mask, count)


def fetched(x: Tensor, slots: Tensor, dim: int = 2) -> Tensor:
    """What stands at `slots`, (batch, count), of the length, which is dimension `dim`: (batch,
    heads, length, d) -> (batch, heads, count, d)."""
    at = slots.reshape(
        slots.shape[:1] + (1,) * (dim - 1) + slots.shape[1:] + (1,) * (x.dim() - dim - 1)
    )
    sizes = [-1 if axis in (0, dim) else size for axis, size in enumerate(x.shape)]
    return x.gather(dim, at.expand(sizes))


def starts_real(key_mask: Tensor | None) -> bool:
    """Whether every sample is known to begin with a real token. False too where finding out would
    stall; a mask on the meta device is taken to hide nothing."""
    if key_mask is None or key_mask.is_meta:
        return True
    return can_look(key_mask) and not bool(leading(key_mask).any())


def ends_real(key_mask: Tensor | None) -> bool:
    """As `starts_real`, of the last token."""
    if key_mask is None or key_mask.is_meta:
        return True
    return can_look(key_mask) and bool(key_mask[:, -1:].all())


def fills_slots(key_mask: Tensor | None) -> bool:
    """Whether every sample is known to begin and to end with a real token."""
    return starts_real(key_mask) and ends_real(key_mask)


def ahead_behind(x: Tensor, key_mask: Tensor, dim: int = 2) -> Tensor:
    """x, whose dimension `dim` is the length, with the leading padding of every sample behind its
    end, so that a real token stands where it would stand alone."""
    slots = torch.arange(x.shape[dim], device=x.device)
    return fetched(x, (slots + leading(key_mask)[:, None]) % x.shape[dim], dim)


def moved_behind(call: Call) -> Call:
    """The square call with `ahead_behind` of all that it holds. `moved_back` takes its rows
    back."""
    mask = call.key_mask
    assert mask is not None
    return call.mapped(
        dict.fromkeys(("queries", "keys"), lambda x, dim: ahead_behind(x, mask, dim))
    )


def moved_back(out: Tensor, key_mask: Tensor) -> Tensor:
    """Rows of the call that `moved_behind` made of one with this key_mask, in the call's own order;
    rows on leading padding, which sees nothing, are 0."""
    slots = torch.arange(out.shape[2], device=out.device)
    slots = (slots - leading(key_mask)[:, None]) % out.shape[2]
    leading_rows = stand_on_leading(key_mask)[:, None, :, None]
    return fetched(out, slots).masked_fill(leading_rows, 0.0)


def stand_on_leading(key_mask: Tensor) -> Tensor:
    """Which rows of a square call stand on leading padding, (batch, length) bool; none where no
    token of a sample is real."""
    return (key_mask.cumsum(1) == 0) & key_mask.any(1, keepdim=True)


def squared(call: Call) -> Call:
    """The call with rows of zeros before its queries, as many as make it square. It has fewer
    queries than keys."""
    offset = call.offset
    return call.mapped(
        {"queries": lambda x, dim: F.pad(x, (0, 0) * (x.dim() - dim - 1) + (offset, 0))}
    )
