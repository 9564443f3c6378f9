"""Where the real tokens of padded samples stand, and how leading padding is moved to the end.

A slot is an index along the length. A sample's leading padding is what stands before its first real
token. Moved behind the end, it leaves every real token where it would stand without padding.
Throughout, key_mask is (batch, length) bool, True for real tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.sequences.ordering import true_first


def first_real(key_mask: Tensor, count: int) -> Tensor:
    """Which slots hold the first `count` real tokens of their sample, (batch, length) bool."""
    return key_mask & (key_mask.cumsum(1) <= count)


def leading(key_mask: Tensor) -> Tensor:
    """How many padded slots stand before the first real token of each sample, (batch,); 0 where no
    token is real."""
    return key_mask.to(torch.uint8).argmax(1)


def ends(key_mask: Tensor) -> Tensor:
    """One more than the slot of the last real token of each sample, (batch,); 0 where no token is
    real."""
    slots = torch.arange(1, key_mask.shape[1] + 1, device=key_mask.device)
    return (key_mask * slots).amax(1)


def slots_of(mask: Tensor, count: int) -> Tensor:
    """The slots at which a mask is True.

    mask: (batch, length) bool
    count: how many slots to return for each sample

    Returns (batch, count), in ascending order; a sample with fewer is filled up with other slots,
    each of them once.
    """
    return true_first(mask, count)


def fetched(x: Tensor, slots: Tensor, dim: int = 2) -> Tensor:
    """Gather what stands at some slots of each sample.

    x: (batch, ..., length, ...), whose dimension `dim` is the length
    slots: (batch, count)
    dim: the dimension of the length; 2 for (batch, heads, length, d)

    Returns x with `count` slots in dimension `dim`.
    """
    at = slots.reshape(
        slots.shape[:1] + (1,) * (dim - 1) + slots.shape[1:] + (1,) * (x.dim() - dim - 1)
    )
    sizes = [-1 if axis in (0, dim) else size for axis, size in enumerate(x.shape)]
    return x.gather(dim, at.expand(sizes))


def starts_real(key_mask: Tensor | None) -> bool:
    """Whether every sample is known to begin with a real token.

    False, too, where the mask cannot be read without waiting for a device. No mask, or one on the
    meta device, is taken to hide nothing.
    """
    if key_mask is None or key_mask.is_meta:
        return True
    return can_look(key_mask) and (bool(key_mask[:, :1].all()) or not bool(leading(key_mask).any()))


def ends_real(key_mask: Tensor | None) -> bool:
    """Whether every sample is known to end with a real token; otherwise as `starts_real`."""
    if key_mask is None or key_mask.is_meta:
        return True
    return can_look(key_mask) and bool(key_mask[:, -1:].all())


def fills_slots(key_mask: Tensor | None) -> bool:
    """Whether every sample is known to begin and to end with a real token."""
    return starts_real(key_mask) and ends_real(key_mask)


def ahead_behind(x: Tensor, key_mask: Tensor, dim: int = 2) -> Tensor:
    """Move the leading padding of each sample behind its end.

    x: (batch, ..., length, ...), whose dimension `dim` is the length
    key_mask: (batch, length) bool
    dim: the dimension of the length; 2 for (batch, heads, length, d)

    Returns a tensor of the shape of x.
    """
    slots = torch.arange(x.shape[dim], device=x.device)
    return fetched(x, (slots + leading(key_mask)[:, None]) % x.shape[dim], dim)


def moved_behind(call: Call) -> Call:
    """A call with `ahead_behind` applied to everything along its length. `moved_back` reorders the
    rows of its output.

    call: it has a key_mask, and as many queries as keys
    """
    mask = call.key_mask
    assert mask is not None
    return call.mapped(
        dict.fromkeys(("queries", "keys"), lambda x, dim: ahead_behind(x, mask, dim))
    )


def moved_back(out: Tensor, key_mask: Tensor) -> Tensor:
    """Put the rows of the output back in the order that they had before `moved_behind`.

    out: (batch, heads, length, value_dim)
    key_mask: of the call before it was moved

    Returns the same shape; rows on leading padding, which see nothing, are 0.
    """
    slots = torch.arange(out.shape[2], device=out.device)
    slots = (slots - leading(key_mask)[:, None]) % out.shape[2]
    leading_rows = stand_on_leading(key_mask)[:, None, :, None]
    return fetched(out, slots).masked_fill(leading_rows, 0.0)


def stand_on_leading(key_mask: Tensor) -> Tensor:
    """Which rows stand on leading padding, in a call with as many queries as keys, (batch, length)
    bool; none in a sample without real tokens."""
    return (key_mask.cumsum(1) == 0) & key_mask.any(1, keepdim=True)


def squared(call: Call) -> Call:
    """A call with fewer queries than keys, with rows of zeros put before its queries, so that it
    has as many of both."""
    offset = call.offset
    return call.mapped(
        {"queries": lambda x, dim: F.pad(x, (0, 0) * (x.dim() - dim - 1) + (offset, 0))}
    )
