"""Softmax over whole blocks of keys, each as one key, their mean or a learned one: a row weighs
every block that has ended, and the values of a block alike."""

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
from attnzoo.engines.sparse.selected.learned_keys import LearnedKeys
from attnzoo.engines.sparse.selected.pooling import Pooling
from attnzoo.engines.sparse.selected.selection import Placed
from attnzoo.engines.stretch_sums import KEY_SUMS, VALUE_SUMS
from attnzoo.sequences.padding import leading


class PooledSoftmax(SoftmaxReference):
    """A_ij = Σ_c P_ic / (real keys of c) over the blocks c in which key j lies, and P a causal
    softmax of q_i·key(c) over the blocks that end at row i or before it; padded keys count in
    no mean.

    pooling: the blocks
    learned: makes the key of a block; None: it is the mean of the block's keys
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    def __init__(
        self, pooling: Pooling, scale: float | None = None, learned: LearnedKeys | None = None
    ) -> None:
        super().__init__(scale)
        self.pooling, self.learned = pooling, learned

    def keys(self, placed: Placed, dtype: torch.dtype) -> Tensor:
        """The key of every block, (batch, kv_heads, blocks, head_dim) in dtype."""
        if self.learned is None:
            known = placed.call.get(KEY_SUMS.name)
            return self.pooling.means(placed.call.k, placed, dtype, known)
        return self.learned(placed, dtype)

    def matrix(self, call: Call) -> Tensor:
        placed, dtype = Placed.of(call), accumulation_dtype(call.q.dtype)
        keys = repeat_heads(self.keys(placed, dtype), call.group)
        scores = (call.q.to(dtype) @ keys.mT) * self.scale_of(call.q)
        ended = self.pooling.ended(placed)[:, None]
        weights = masked_softmax(scores.masked_fill(~ended, -torch.inf))
        counts = self.pooling.counts(placed).clamp(min=1)[:, None, None]
        of_stretches = self.pooling.of_stretches(weights / counts)
        slots = torch.arange(call.key_length, device=call.k.device)[None]
        if call.key_mask is not None:
            slots = (slots - leading(call.key_mask)[:, None]).clamp(min=0)
        index = (slots // self.pooling.stride)[:, None, None].expand(*weights.shape[:3], -1)
        found = of_stretches.gather(3, index)
        if call.key_mask is None:
            return found
        return found.masked_fill(~call.key_mask[:, None, None], 0.0)

    def cost(self, shape: Shape) -> Cost:
        blocks = self.pooling.blocks(shape.key_length)
        pairs = shape.heads * shape.query_length * blocks
        first = max(0, shape.key_length - shape.query_length)
        ended = self.pooling.ended_pairs(shape.key_length) - self.pooling.ended_pairs(first)
        per_pair = 2 * shape.batch_size * shape.head_dim
        means = shape.batch_size * shape.kv_heads * blocks * shape.head_dim
        return Cost(
            macs=pairs * per_pair + self.key_macs(shape),
            support_macs=shape.heads * ended * per_pair,
            elementwise=SOFTMAX_OPERATIONS * shape.batch_size * pairs
            + (2 if self.learned is None else 1) * means,
            parameters=0 if self.learned is None else self.learned.numbers,
        )

    def key_macs(self, shape: Shape) -> int:
        """Multiply-accumulates that make the blocks' keys: none of means."""
        sizes = shape.batch_size, shape.kv_heads, shape.key_length
        return 0 if self.learned is None else self.learned.macs(*sizes)


def _attend(engine: PooledSoftmax, call: Call) -> Tensor:
    placed, dtype = Placed.of(call), accumulation_dtype(call.q.dtype)
    k = engine.keys(placed, dtype).to(call.k.dtype)
    known = placed.call.get(VALUE_SUMS.name)
    v = engine.pooling.means(placed.call.v, placed, dtype, known).to(call.v.dtype)
    ended = engine.pooling.ended(placed)[:, None]
    return sdpa.sdpa(engine, call.q, k, v, ended, scale=engine.scale_of(call.q))


def _why_not(engine: PooledSoftmax, call: Call) -> str | None:
    return sdpa.why_not(engine, call)


PooledSoftmax.backends = (Backend("sdpa", _attend, _why_not), REFERENCE)
