"""Exact softmax attention in tiles, as FlashAttention computes it: an online softmax, and scores
recomputed in the backward pass.

The loops of FlashAttention-2 (Dao 2023, algorithms 1 and 2) in plain torch, so that they can be
read beside the paper. A CPU or GPU kernel does the same in its fast memory; torch's SDPA is that
kernel, this is its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, add_by_distance, bias_between
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import reference
from attnzoo.engines.softmax.softmax import Softmax


class FlashAlgorithm(Softmax):
    """Softmax attention in tiles.

    scale: factor of the scores, 1/sqrt(head_dim) by default
    block_size: number of queries, and of keys, of a tile; one of fewer queries has more keys
    softcap: keeps scores within ±softcap; None: they are as they are

    Its backends in order: `native_row`, one query in C++, which has no use for tiles, where that
    has been compiled; `tiled`; the reference.
    """

    counted_apart = True

    def __init__(
        self, scale: float | None = None, block_size: int = 128, *, softcap: float | None = None
    ) -> None:
        super().__init__(scale, softcap=softcap)
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
        rescaled = sum(rows * -(-keys // tiles.width) for rows, keys in spans)
        whole = super().cost(shape)
        cost = Cost(
            macs=2 * heads * pairs * shape.head_dim,
            support_macs=2 * heads * support * shape.head_dim,
            skipped_macs=2 * heads * (pairs - support) * shape.head_dim,
            elementwise=heads * (pairs + rescaled + shape.query_length * shape.head_dim),
            moved_bytes=whole.moved_bytes,
            state_elements=whole.state_elements,
            state_bytes=whole.state_bytes,
            state_growth=whole.state_growth,
        )
        return self.with_softcap(cost, shape)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a call that hold a visible score.

    size: queries of a tile, and keys: of fewer queries it has more keys
    """

    size: int
    query_length: int
    key_length: int
    is_causal: bool

    @property
    def offset(self) -> int:
        return self.key_length - self.query_length

    @property
    def width(self) -> int:
        """Keys of a tile."""
        return self.size * max(1, self.size // max(1, self.query_length))

    def rows(self) -> Iterator[slice]:
        """Blocks of queries."""
        return (
            slice(start, min(start + self.size, self.query_length))
            for start in range(0, self.query_length, self.size)
        )

    def columns(self, rows: slice) -> Iterator[slice]:
        """Blocks of keys that hold one which a block of queries sees."""
        return (
            slice(start, min(start + self.width, self.key_length))
            for start in range(0, self.seen(rows), self.width)
        )

    def seen(self, rows: slice) -> int:
        """Keys of all those blocks; causal, the last is that of the last query."""
        if not self.is_causal:
            return self.key_length
        tiles = -(-(self.offset + rows.stop) // self.width)
        return min(self.key_length, max(0, tiles * self.width))


def attend(engine: FlashAlgorithm, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype."""
    bias = call.get(DISTANCE_BIAS.name)
    inputs = [x for x in (call.q, call.k, call.v, bias) if x is not None]
    if (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and only_autograd_looks(*inputs)
    ):
        masks = (call.key_mask, call.attn_mask)
        return _Flash.apply(call.q, call.k, call.v, bias, *masks, _frame(call), engine)
    return _forward(engine, call)[0]


def _frame(call: Call) -> Callable[..., Call]:
    """A function of q, k, v and the bias that makes this call with others; it does not keep its
    own."""
    frame = replace(call, inputs={}).frame()

    def of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Call:
        return frame(q, k, v) if bias is None else frame(q, k, v).giving(DISTANCE_BIAS, bias)

    return of


def _forward(engine: FlashAlgorithm, call: Call) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Algorithm 1 (Dao 2023): the output, and m and ℓ of each block of rows, (batch, heads, rows,
    1).

    engine: gives the scale, the softcap, and the queries and keys of a tile
    """
    lengths = (int(call.query_length), int(call.key_length))
    tiles, dtype = (
        Tiles(engine.block_size, *lengths, call.is_causal),
        accumulation_dtype(call.q.dtype),
    )
    scale = engine.scale_of(call.q)
    found: list[tuple[Tensor, Tensor]] = []

    def outputs() -> Iterator[Tensor]:
        for rows in tiles.rows():
            q = call.q[:, :, rows].to(dtype) * scale
            largest = q.new_full((*q.shape[:3], 1), float("-inf"))
            total, out = torch.zeros_like(largest), q.new_zeros(*q.shape[:3], call.v.shape[3])
            for keys in tiles.columns(rows):
                scores = _masked(_capped(engine, q, call, keys), call, tiles, rows, keys)
                largest, before = largest.maximum(scores.amax(-1, keepdim=True)), largest
                finite = largest.clamp(
                    min=torch.finfo(dtype).min
                )  # -inf while nothing is seen; -inf - finite is -inf, no NaN
                weights, shrink = exp_(scores - finite), (before - finite).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                out = out * shrink + weights @ _tile(call.v, keys, call.group, dtype)
            found.append((largest, total))
            yield (out / total.masked_fill(total == 0, 1.0)).to(call.q.dtype)

    return join(outputs(), tiles.query_length, 2), found


def _log_sum(largest: Tensor, total: Tensor) -> Tensor:
    """L = log Σ_j exp(s_ij) of rows, +inf for one that sees no key."""
    return (largest + total.log()).masked_fill(total == 0, float("inf"))


def _capped(engine: FlashAlgorithm, q: Tensor, call: Call, keys: slice) -> Tensor:
    """Scores of one tile from scaled queries, (batch, heads, rows, keys), within the softcap."""
    return engine.capped(q @ _tile(call.k, keys, call.group, q.dtype).mT)


def _masked(scores: Tensor, call: Call, tiles: Tiles, rows: slice, keys: slice) -> Tensor:
    """Scores of one tile with what is added to them; -inf where a mask hides the key."""
    bias = call.get(DISTANCE_BIAS.name)
    if bias is not None:
        scores = scores + bias_between(bias, *_places(tiles, rows, keys, bias)).to(scores.dtype)
    if call.attn_mask is not None:
        tile = _part_of(_part_of(call.attn_mask, -2, rows), -1, keys)
        scores = (
            scores.masked_fill(~tile, float("-inf"))
            if tile.dtype == torch.bool
            else scores + tile.to(scores.dtype)
        )
    if call.key_mask is not None:
        scores = scores.masked_fill(~call.key_mask[:, None, None, keys], float("-inf"))
    if tiles.is_causal and keys.stop - 1 > tiles.offset + rows.start:
        positions, places = _places(tiles, rows, keys, scores)
        scores = scores.masked_fill(places > positions, float("-inf"))
    return scores


def _places(tiles: Tiles, rows: slice, keys: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the queries and the keys of a tile stand, (rows, 1) and (keys,)."""
    start, stop = tiles.offset + rows.start, tiles.offset + rows.stop
    positions = torch.arange(start, stop, device=like.device)[:, None]
    return positions, torch.arange(keys.start, keys.stop, device=like.device)


def _tile(x: Tensor, part: slice, group: int, dtype: torch.dtype) -> Tensor:
    return repeat_heads(x[:, :, part], group).to(dtype)


def _part_of(mask: Tensor, dim: int, part: slice) -> Tensor:
    """A slice of a mask along one dimension, unless the mask is the same all along it."""
    if mask.dim() < -dim or mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, part.start, part.stop - part.start)


class _Flash(torch.autograd.Function):
    """Keeps q, k, v, the bias, the output and L; scores and A are computed again, tile by tile
    (Dao 2023, algorithm 2)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        attn_mask: Tensor | None,
        frame: Callable[..., Call],
        engine: FlashAlgorithm,
    ) -> Tensor:
        out, found = _forward(engine, frame(q, k, v, bias))
        log_sums = torch.cat([_log_sum(*of_rows) for of_rows in found], 2)
        ctx.save_for_backward(q, k, v, bias, key_mask, attn_mask, out, log_sums)
        ctx.frame, ctx.engine = frame, engine
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, _, _, out, log_sums = ctx.saved_tensors
        frame, engine = ctx.frame, ctx.engine
        if is_followed(gradients[0]):

            def compute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
                return _forward(engine, frame(q, k, v, bias))[0]

            return *open_gradients(compute, (q, k, v, bias), gradients[0]), *[None] * 4
        call, scale, cap = frame(q, k, v, bias), engine.scale_of(q), engine.softcap
        dtype, group = log_sums.dtype, call.group
        tiles = Tiles(engine.block_size, call.query_length, call.key_length, call.is_causal)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        for rows in tiles.rows():
            q_tile, upstream, out_tile = (x[:, :, rows].to(dtype) for x in (q, gradients[0], out))
            q_tile = q_tile * scale
            pull = (upstream * out_tile).sum(
                -1, keepdim=True
            )  # D_i: what a row's weights, whose sum is fixed, give back together
            for keys in tiles.columns(rows):
                k_tile, v_tile = _tile(k, keys, group, dtype), _tile(v, keys, group, dtype)
                capped = _capped(engine, q_tile, call, keys)
                scores = _masked(capped, call, tiles, rows, keys)
                weights = exp_(scores - log_sums[:, :, rows])
                d_scores = weights * (upstream @ v_tile.mT - pull)
                if to_bias is not None:
                    queries, places = _places(tiles, rows, keys, to_bias)
                    add_by_distance(to_bias, d_scores.sum(0), queries, places)
                if cap is not None:
                    d_scores = d_scores * (1 - (capped / cap).square())
                dq[:, :, rows] += d_scores @ k_tile * scale
                dk[:, :, keys] += _summed(d_scores.mT @ q_tile, group)
                dv[:, :, keys] += _summed(weights.mT @ upstream, group)
        to_bias = None if bias is None or to_bias is None else to_bias.to(bias.dtype)
        return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), to_bias, *[None] * 4)


def _summed(x: Tensor, group: int) -> Tensor:
    """Gradients of the query heads that share a key head, added up."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2)


def _why_not(engine: FlashAlgorithm, call: Call) -> str | None:
    mask = call.attn_mask
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "a learned additive attn_mask gets no gradient from tiles"
    return None


FlashAlgorithm.backends = (
    one_row.backend(),
    Backend("tiled", attend, _why_not),
    Backend("reference", reference, never_refuses, packs=True),
)
