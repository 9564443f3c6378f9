"""Exact softmax attention in tiles, as FlashAttention computes it: an online softmax, and scores
recomputed in the backward pass.

The loops of FlashAttention-2 (Dao 2023, algorithms 1 and 2) in plain torch, so that they can be
read beside the paper. A CPU or GPU kernel does the same in its fast memory; torch's SDPA is that
kernel, this is its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.arguments import check_positive
from attnzoo.call import Call, repeat_heads
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.engine import (
    Backend,
    Cost,
    Shape,
    accumulation_dtype,
    causal_pairs,
    never_refuses,
)
from attnzoo.engines.exponential import exp_
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.softmax.reference import additive, reference
from attnzoo.engines.softmax.softmax import Softmax


class FlashAlgorithm(Softmax):
    """Softmax attention in tiles.

    scale: factor of the scores, 1/sqrt(head_dim) by default
    block_size: number of queries, and of keys, of a tile
    """

    counted_apart = True

    def __init__(self, scale: float | None = None, block_size: int = 128) -> None:
        super().__init__(scale)
        self.block_size = self.square_tiles = check_positive("block_size", block_size)

    def cost(self, shape: Shape) -> Cost:
        tiles = Tiles(self.block_size, shape.query_length, shape.key_length, shape.is_causal)
        spans = [(rows.stop - rows.start, tiles.seen(rows)) for rows in tiles.rows()]
        pairs = sum(rows * keys for rows, keys in spans)
        support = (
            causal_pairs(shape.query_length, shape.key_length)
            if shape.is_causal
            else shape.query_length * shape.key_length
        )
        heads = shape.batch_size * shape.heads
        rescaled = sum(rows * -(-keys // self.block_size) for rows, keys in spans)
        whole = super().cost(shape)
        return Cost(
            macs=2 * heads * pairs * shape.head_dim,
            support_macs=2 * heads * support * shape.head_dim,
            skipped_macs=2 * heads * (pairs - support) * shape.head_dim,
            elementwise=heads * (pairs + rescaled + shape.query_length * shape.head_dim),
            moved_bytes=whole.moved_bytes,
            state_elements=whole.state_elements,
            state_bytes=whole.state_bytes,
            state_growth=whole.state_growth,
        )


@dataclass(frozen=True)
class Tiles:
    """The tiles of a call that hold a visible score."""

    size: int
    query_length: int
    key_length: int
    is_causal: bool

    @property
    def offset(self) -> int:
        return self.key_length - self.query_length

    def rows(self) -> Iterator[slice]:
        """Blocks of queries."""
        return (
            slice(start, min(start + self.size, self.query_length))
            for start in range(0, self.query_length, self.size)
        )

    def columns(self, rows: slice) -> Iterator[slice]:
        """Blocks of keys that hold one which a block of queries sees."""
        return (
            slice(start, min(start + self.size, self.key_length))
            for start in range(0, self.seen(rows), self.size)
        )

    def seen(self, rows: slice) -> int:
        """Keys of all those blocks; causal, the last is that of the last query."""
        if not self.is_causal:
            return self.key_length
        return min(self.key_length, max(0, -(-(self.offset + rows.stop) // self.size) * self.size))


def attend(engine: FlashAlgorithm, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype."""
    scale = engine.scale_of(call.q)
    inputs = (call.q, call.k, call.v)
    if (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and only_autograd_looks(*inputs)
    ):
        return _Flash.apply(
            call.q,
            call.k,
            call.v,
            call.key_mask,
            call.attn_mask,
            call.frame(),
            scale,
            engine.block_size,
        )
    return _forward(call, scale, engine.block_size)[0]


def _forward(call: Call, scale: float, size: int) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 1 (Dao 2023): the output, and of each block of rows L = log Σ_j exp(s_ij), (batch,
    heads, rows, 1), +inf for a row that sees no key.

    scale: of the scores
    size: queries and keys of a tile
    """
    tiles, dtype = (
        Tiles(size, int(call.query_length), int(call.key_length), call.is_causal),
        accumulation_dtype(call.q.dtype),
    )
    log_sums: list[Tensor] = []

    def outputs() -> Iterator[Tensor]:
        for rows in tiles.rows():
            q = call.q[:, :, rows].to(dtype) * scale
            largest = q.new_full((*q.shape[:3], 1), float("-inf"))
            total, out = torch.zeros_like(largest), q.new_zeros(*q.shape[:3], call.v.shape[3])
            for keys in tiles.columns(rows):
                scores = _scores(q, call, tiles, rows, keys)
                largest, before = largest.maximum(scores.amax(-1, keepdim=True)), largest
                finite = largest.clamp(
                    min=torch.finfo(dtype).min
                )  # -inf while nothing is seen; -inf - finite is -inf, no NaN
                weights, shrink = exp_(scores - finite), (before - finite).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                out = out * shrink + weights @ _tile(call.v, keys, call.group, dtype)
            empty = total == 0
            log_sums.append((largest + total.log()).masked_fill(empty, float("inf")))
            yield (out / total.masked_fill(empty, 1.0)).to(call.q.dtype)

    return join(outputs(), tiles.query_length, 2), log_sums


def _scores(q: Tensor, call: Call, tiles: Tiles, rows: slice, keys: slice) -> Tensor:
    """Scores of one tile from scaled queries, (batch, heads, rows, keys); -inf where a mask hides
    the key."""
    scores = q @ _tile(call.k, keys, call.group, q.dtype).mT
    if call.attn_mask is not None:
        tile = _part_of(_part_of(call.attn_mask, -2, rows), -1, keys)
        scores = (
            scores.masked_fill(~tile, float("-inf"))
            if tile.dtype == torch.bool
            else scores + tile.to(q.dtype)
        )
    if call.key_mask is not None:
        scores = scores.masked_fill(~call.key_mask[:, None, None, keys], float("-inf"))
    if tiles.is_causal and keys.stop - 1 > tiles.offset + rows.start:
        position = torch.arange(
            tiles.offset + rows.start, tiles.offset + rows.stop, device=q.device
        )
        scores = scores.masked_fill(
            torch.arange(keys.start, keys.stop, device=q.device) > position[:, None], float("-inf")
        )
    return scores


def _tile(x: Tensor, part: slice, group: int, dtype: torch.dtype) -> Tensor:
    return repeat_heads(x[:, :, part], group).to(dtype)


def _part_of(mask: Tensor, dim: int, part: slice) -> Tensor:
    """A slice of a mask along one dimension, unless the mask is the same all along it."""
    if mask.dim() < -dim or mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, part.start, part.stop - part.start)


class _Flash(torch.autograd.Function):
    """Keeps q, k, v, the output and L; scores and A are computed again, tile by tile (Dao 2023,
    algorithm 2)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        attn_mask: Tensor | None,
        *fixed: Any,
    ) -> Tensor:
        frame, scale, size = fixed
        out, log_sums = _forward(frame(q, k, v), scale, size)
        ctx.save_for_backward(q, k, v, key_mask, attn_mask, out, torch.cat(log_sums, 2))
        ctx.fixed = fixed
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _, out, log_sums = ctx.saved_tensors
        frame, scale, size = ctx.fixed
        if is_followed(gradients[0]):

            def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return _forward(frame(q, k, v), scale, size)[0]

            return *open_gradients(compute, (q, k, v), gradients[0]), *[None] * 5
        call = frame(q, k, v)
        dtype, group = log_sums.dtype, call.group
        tiles = Tiles(size, call.query_length, call.key_length, call.is_causal)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        for rows in tiles.rows():
            q_tile, upstream, out_tile = (x[:, :, rows].to(dtype) for x in (q, gradients[0], out))
            q_tile = q_tile * scale
            pull = (upstream * out_tile).sum(
                -1, keepdim=True
            )  # D_i: what a row's weights, whose sum is fixed, give back together
            for keys in tiles.columns(rows):
                k_tile, v_tile = _tile(k, keys, group, dtype), _tile(v, keys, group, dtype)
                weights = exp_(_scores(q_tile, call, tiles, rows, keys) - log_sums[:, :, rows])
                d_scores = weights * (upstream @ v_tile.mT - pull)
                dq[:, :, rows] += d_scores @ k_tile * scale
                dk[:, :, keys] += _summed(d_scores.mT @ q_tile, group)
                dv[:, :, keys] += _summed(weights.mT @ upstream, group)
        return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5)


def _summed(x: Tensor, group: int) -> Tensor:
    """Gradients of the query heads that share a key head, added up."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2)


def _why_not(engine: FlashAlgorithm, call: Call) -> str | None:
    bias = additive(call)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "a learned additive attn_mask gets no gradient from tiles"
    return None


FlashAlgorithm.backends = (
    Backend("tiled", attend, _why_not),
    Backend("reference", reference, never_refuses, packs=True),
)
