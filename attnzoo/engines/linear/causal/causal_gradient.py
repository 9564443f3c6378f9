"""Causal linear attention in chunks, forward and back, span by span.

A span is a run of chunks that are computed side by side (`chunks.spans`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.bidirectional import (
    Rows,
    backward_absorb,
    through_weighted_sums,
    visible,
)
from attnzoo.engines.linear.causal.chunks import Block, Piece, causal, spans_of
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.layout import add_product, grouped, ungrouped
from attnzoo.engines.linear.sums import Past, absorb, underflow
from attnzoo.engines.piece_by_piece import join


def causal_pieces(feature_map: FeatureMap, call: Call) -> Iterator[Piece]:
    early, late = parts_of(call)
    past = None
    if early is not None:
        past = absorb(feature_map, early.k, early.v, early.key_mask, None)
    return causal(feature_map, late, past)


def parts_of(call: Call) -> tuple[Call | None, Call]:
    """Split a causal call in two: the early keys that every query sees (None when there are as many
    queries as keys), and the remaining call, which has as many queries as keys."""
    if not call.offset:
        return None, call
    return (
        call.select(keys=slice(None, call.offset)),
        call.select(keys=slice(call.offset, None)),
    )


def forward(feature_map: FeatureMap, call: Call) -> tuple[Tensor, Tensor | None, list[Past | None]]:
    """A·v, what its rows were divided by (None: nothing), and the sums before each span."""
    divisors: list[Tensor] = []
    pasts: list[Past | None] = []

    def rows() -> Iterator[Tensor]:
        for piece in causal_pieces(feature_map, call):
            if piece.divisor is not None:
                divisors.append(piece.divisor)
            pasts.append(piece.past)
            yield piece.rows

    out = join(rows(), call.query_length, 2, like=call.q)
    return out, torch.cat(divisors, 2) if divisors else None, pasts


def _rows_of(rows: Rows, start: int, end: int, kv_heads: int, chunks: int) -> Tensor:
    """Gradient of the rows from start to end before they were divided by their sums, laid out by
    `grouped`, with that of the sums as a last column: (..., value_dim + 1). Rows that are not
    normalised have no such column."""
    numerator, normalizer = rows.of(slice(start, end))
    if normalizer is not None:
        return grouped(torch.cat([numerator, normalizer], -1), kv_heads, chunks)
    # A product would copy an operand whose strides skip over other rows, and this one enters
    # several products: one copy now is cheaper.
    return grouped(numerator if chunks == 1 else numerator.contiguous(), kv_heads, chunks)


def backward(
    feature_map: FeatureMap, call: Call, rows: Rows, pasts: Sequence[Past | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, span by span from the end, carrying the gradient of the sums that
    later spans read. pasts: the sums before each span."""
    d_q, d_k, d_v = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    early, late = parts_of(call)
    end, d_sums = late.query_length, None
    found = spans_of(feature_map, late)
    for (tokens, chunks), past in zip(reversed(found), reversed(pasts), strict=True):
        start, remember = end - tokens, d_sums is not None
        here, there = slice(start, end), slice(call.offset + start, call.offset + end)
        span = late.select(queries=here, keys=here)
        block = Block.of(feature_map, span, past, chunks, remember)
        d_rows = _rows_of(rows, start, end, call.k.shape[1], chunks)
        d_features, d_values, d_log_scale, d_q_features, d_sums = _backward_block(
            block, d_rows, d_sums, call.group, feature_map.scale_has_gradient
        )
        q_features = (
            block.q_features
            if block.totals is None
            else _undivided(block.q_features, block.totals, call.group)
        )
        d_q[:, :, here] = ungrouped(
            feature_map.query_vjp(block.q, q_features, d_q_features), call.group
        )
        d_v[:, :, there] = d_values.flatten(2, 3)
        d_features = visible(d_features.flatten(2, 3), span.key_mask)
        d_log_scale = None if d_log_scale is None else d_log_scale.flatten(2, 3)
        d_k[:, :, there] = feature_map.vjp(
            block.k.flatten(2, 3), block.k_features.flatten(2, 3), d_features, d_log_scale
        )
        end = start
    if early is not None:
        past = pasts[0]
        assert past is not None and d_sums is not None
        backward_absorb(
            feature_map, early, past, d_sums, d_k[:, :, : call.offset], d_v[:, :, : call.offset]
        )
    return d_q, d_k, d_v


def _backward_block(
    block: Block, d_rows: Tensor, d_after: Tensor | None, group: int, of_scale: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of key features, values, log_scale (None unless of_scale), query features and the
    sums before the block (None if there are none).

    d_rows: gradient of the rows, as `_rows_of` gives it
    d_after: gradient of the sums after the block; None when nothing reads them
    """
    value_dim, width = block.v.shape[-1] - 1, d_rows.shape[-1]
    normalizes = width > value_dim
    d_attention = (d_rows @ block.v[..., :width].mT).unflatten(3, (group, -1))
    d_log_scale = None
    if block.relative is None:
        d_scores = d_attention.tril_().flatten(3, 4)
    else:
        d_log_scale = (block.attention * d_attention.flatten(3, 4)).sum(3) if of_scale else None
        d_scores = d_attention.mul_(block.relative[:, :, :, None]).flatten(3, 4)
    d_q_features, d_k_features = d_scores @ block.k_features, d_scores.mT @ block.q_features
    d_values = block.attention.mT @ d_rows[..., :value_dim]
    d_read = None
    if block.before is not None:
        carried = d_rows if block.carry is None else d_rows * block.carry
        d_q_features = add_product(d_q_features, carried, block.before[..., :width].mT)
        d_read = block.q_features.mT @ carried
    d_totals = None
    if block.totals is not None:
        d_q_features, d_totals = _through_division(block, d_q_features, group)
        assert block.relative is not None
        d_k_features = add_product(
            d_k_features, block.relative.mT.expand(*d_totals.shape[:3], -1, -1), d_totals
        )
    if d_read is not None and not normalizes:
        d_read = (
            F.pad(d_read, (0, 1))
            if d_totals is None
            else torch.cat([d_read, _carried(block, d_totals)], -1)
        )
    d_sums, d_before = _gradients_of_sums(d_read, block.shrink, d_after)
    if d_sums is None:
        return d_k_features, d_values, d_log_scale, d_q_features, d_before
    if block.weights is None:
        d_k_features = add_product(d_k_features, block.v, d_sums.mT)
        d_values = add_product(d_values, block.k_features, d_sums[..., :-1])
    else:
        d_features, d_more, d_log_weights = through_weighted_sums(
            block.k_features, block.weights, block.v[..., :-1], d_sums, of_scale
        )
        d_k_features += d_features
        d_values += d_more
        if d_log_scale is not None and d_log_weights is not None:
            d_log_scale += d_log_weights
    return d_k_features, d_values, d_log_scale, d_q_features, d_before


def _carried(block: Block, d_totals: Tensor) -> Tensor:
    """Gradient that the totals of the rows send to the last column of the sums before them."""
    if block.carry is None:
        return d_totals.sum(3)[..., None]
    return d_totals.mT @ block.carry[..., : d_totals.shape[3], :]


def _undivided(quotients: Tensor, totals: Tensor, group: int) -> Tensor:
    """The query features before they were divided by their totals."""
    return (quotients.unflatten(3, (group, -1)) * totals[:, :, :, None]).flatten(3, 4)


def _through_division(block: Block, d_quotients: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Gradients of the query features and of the `totals` that divided them, from the gradient of
    the quotients."""
    assert block.totals is not None
    d_features = d_quotients.unflatten(3, (group, -1)) / block.totals[:, :, :, None]
    d_totals = d_features * block.q_features.unflatten(3, (group, -1))
    # Without a group there is nothing to sum, and summing would still pass over all memory.
    d_totals = (d_totals.sum(3) if group > 1 else d_totals[:, :, :, 0]).neg_()
    return d_features.flatten(3, 4), d_totals.masked_fill_(
        block.totals <= underflow(block.totals), 0.0
    )


def _gradients_of_sums(
    d_read: Tensor | None, shrink: Tensor | None, d_after: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the sums after each chunk, and of those before the first one.

    d_read: (batch, kv_heads, chunks, ...), what each chunk's rows send to the sums before it
    shrink: (batch, kv_heads, chunks), what each chunk multiplied earlier sums by; None: 1
    d_after: gradient of the sums after the last chunk; None when nothing reads them
    """
    if d_after is None:
        return None, None if d_read is None else d_read[:, :, 0]
    if d_read is None:  # one chunk without a past
        return d_after[:, :, None], None
    d_sums: list[Tensor] = []
    for chunk in reversed(range(d_read.shape[2])):
        d_sums.insert(0, d_after)
        shrunk = d_after if shrink is None else d_after * shrink[:, :, chunk, None, None]
        d_after = shrunk + d_read[:, :, chunk]
    return torch.stack(d_sums, 2), d_after
