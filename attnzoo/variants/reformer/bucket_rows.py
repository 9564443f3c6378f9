"""A call in the rows of its key heads: what buckets are made of, and what stands at a row's own
position."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import (
    accumulation_dtype,
)
from attnzoo.engines.sparse.selected.grouped_rows import rows_of
from attnzoo.variants.reformer.angular_hash import AngularHash
from attnzoo.variants.reformer.hash_chunks import (
    Chunks,
    number_chunks,
)


def chunks_of(hashing: AngularHash, chunk_size: int, call: Call) -> Chunks:
    """The chunks of the keys of every key head and of the rows that share it, (batch · kv_heads,
    num_hashes, ...)."""
    keys = hashing(call.k.flatten(0, 1))
    mask = (
        None
        if call.key_mask is None
        else call.key_mask.repeat_interleave(call.k.shape[1], 0)[:, None]
    )
    return number_chunks(
        hashing(rows_of(call.q, call)),
        keys,
        positions_of(call),
        mask,
        chunk_size,
        call.is_causal,
    )


def positions_of(call: Call) -> Tensor:
    """The position of every row of a key head, (query_length · group,)."""
    return torch.arange(call.offset, call.key_length, device=call.q.device).repeat_interleave(
        call.group
    )


def own_of(x: Tensor, call: Call) -> Tensor:
    """What stands at the position of every row, (..., query_length · group, d), 0 where nothing
    does.

    x: (..., key_length, d)
    """
    return F.pad(x, (0, 0, max(0, -call.offset), 0))[
        ..., max(0, call.offset) :, :
    ].repeat_interleave(call.group, -2)


def own_is_real(call: Call) -> Tensor:
    """Whether a key stands at the position of a row, (batch · kv_heads or 1, query_length · group,
    1)."""
    if call.key_mask is None:
        return (positions_of(call) >= 0)[None, :, None]
    real = own_of(call.key_mask[..., None].to(torch.uint8), call) > 0
    return real.repeat_interleave(call.k.shape[1], 0)


def with_unit_keys(call: Call) -> Call:
    """The call with its keys scaled to length 1; a key of length 0 stays."""
    k = call.k.to(accumulation_dtype(call.k.dtype))
    square = k.square().sum(-1, keepdim=True)
    return replace(call, k=k * square.clamp(min=torch.finfo(k.dtype).tiny).rsqrt())
