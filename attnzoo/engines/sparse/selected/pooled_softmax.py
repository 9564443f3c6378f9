"""Softmax over the means of whole blocks of keys: a row weighs every block that has ended, and the
values of a block alike."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import (
    SOFTMAX_OPERATIONS,
    Backend,
    Cost,
    Shape,
    accumulation_dtype,
)
from attnzoo.engines.softmax import sdpa
from attnzoo.engines.softmax.reference import REFERENCE, SoftmaxReference, masked_softmax
from attnzoo.engines.sparse.selected.selection import Placed, in_blocks
from attnzoo.sequences.padding import leading


class PooledSoftmax(SoftmaxReference):
    """A_ij = P_ic / (real keys of c) for the block c of key j, and P a causal softmax of q_i·mean(k
    in c) over the blocks that end at row i or before it; padded keys count in no mean.

    block_size: keys of a block, counted from the first real token
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    def __init__(self, block_size: int, scale: float | None = None) -> None:
        super().__init__(scale)
        self.block_size = block_size

    def matrix(self, call: Call) -> Tensor:
        placed, dtype = Placed.of(call), accumulation_dtype(call.q.dtype)
        means = repeat_heads(means_of(placed.call.k, placed, self.block_size), call.group)
        scores = (call.q.to(dtype) @ means.to(dtype).mT) * self.scale_of(call.q)
        ended = ended_blocks(placed, self.block_size)[:, None]
        weights = masked_softmax(scores.masked_fill(~ended, -torch.inf))
        slots = torch.arange(call.key_length, device=call.k.device)[None]
        counts = placed.real_keys(self.block_size).clamp(min=1)
        if call.key_mask is not None:
            slots = (slots - leading(call.key_mask)[:, None]).clamp(min=0)
        block = slots // self.block_size
        each = 1.0 / counts.expand(len(block), -1).gather(1, block).to(dtype)
        if call.key_mask is not None:
            each = each.masked_fill(~call.key_mask, 0.0)
        index = block[:, None, None].expand(*weights.shape[:3], -1)
        return weights.gather(3, index) * each[:, None, None]

    def cost(self, shape: Shape) -> Cost:
        size = self.block_size
        key_blocks = -(-shape.key_length // size)
        pairs = shape.heads * shape.query_length * key_blocks
        first = max(0, shape.key_length - shape.query_length)
        ended = _floors(shape.key_length, size) - _floors(first, size)
        per_pair = 2 * shape.batch_size * shape.head_dim
        means = 2 * shape.batch_size * shape.kv_heads * key_blocks * shape.head_dim
        return Cost(
            macs=pairs * per_pair,
            support_macs=shape.heads * ended * per_pair,
            elementwise=SOFTMAX_OPERATIONS * shape.batch_size * pairs + means,
        )


def means_of(x: Tensor, placed: Placed, block_size: int) -> Tensor:
    """The mean over the real keys of every block, (batch, kv_heads, key_blocks, d) in x's dtype; 0
    where a block has none."""
    total = in_blocks(x, 2, block_size).sum(3, dtype=accumulation_dtype(x.dtype))
    return (total / placed.real_keys(block_size).clamp(min=1)[:, None, :, None]).to(x.dtype)


def ended_blocks(placed: Placed, block_size: int) -> Tensor:
    """Which blocks end at a query or before it and have a key, (batch or 1, query_length,
    key_blocks) bool."""
    counts = placed.real_keys(block_size)
    ends = (torch.arange(counts.shape[1], device=counts.device) + 1) * block_size
    return (ends <= placed.positions[..., None] + 1) & (counts > 0)[:, None]


def _floors(length: int, size: int) -> int:
    """Σ floor(i / size) over i from 1 to length."""
    blocks, rest = divmod(length, size)
    return size * (blocks * (blocks - 1) // 2) + blocks * (rest + 1) if blocks else 0


def _attend(engine: PooledSoftmax, call: Call) -> Tensor:
    placed = Placed.of(call)
    k, v = (means_of(x, placed, engine.block_size) for x in (placed.call.k, placed.call.v))
    ended = ended_blocks(placed, engine.block_size)[:, None]
    return sdpa.sdpa(engine, call.q, k, v, ended, scale=engine.scale_of(call.q))


def _why_not(engine: PooledSoftmax, call: Call) -> str | None:
    return sdpa.why_not(engine, call)


PooledSoftmax.backends = (Backend("sdpa", _attend, _why_not), REFERENCE)
