"""Causal linear attention in chunks of tokens: inside a chunk rows weigh keys through a small
score matrix, and what lies before it they read as sums.

Written in operators that autograd, a compiler and a counter can follow. `gradient` has the same
backward pass, faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear import boundaries
from attnzoo.engines.linear.decay import counted
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.key_weights import write_chunks
from attnzoo.engines.linear.layout import add_product, grouped, ungrouped, with_ones
from attnzoo.engines.linear.sums import Past, added, divisor, keys_of, underflow
from attnzoo.engines.piece_by_piece import at_a_time

CAUSAL_CHUNK = 64  # tokens that see each other through a small score matrix
# Numbers that chunks computed side by side may have: what a cache holds, and malloc keeps for the
# next ones.
HELD = 2**20


@dataclass(frozen=True)
class Piece:
    """Some rows of the output, (batch, heads, tokens, value_dim), what each was divided by (None:
    nothing), and the sums that they read and that they left."""

    rows: Tensor
    divisor: Tensor | None
    past: Past | None
    after: Past | None = None


def _piece(
    call: Call,
    numerator: Tensor,
    normalizer: Tensor | None,
    past: Past | None,
    after: Past | None = None,
) -> Piece:
    if normalizer is None:
        return Piece(ungrouped(numerator, call.group).to(call.q.dtype), None, past, after)
    divided_by = divisor(normalizer)
    return Piece(
        ungrouped(numerator / divided_by, call.group).to(call.q.dtype),
        ungrouped(divided_by, call.group),
        past,
        after,
    )


def spans(length: int, together: int) -> list[tuple[int, int]]:
    """What causal attention computes side by side: the first chunk, which may have no past,
    `together` chunks each time, and the last chunk, which may be short and need not be remembered.
    As (tokens, chunks)."""
    chunks = len(
        range(0, length, CAUSAL_CHUNK)
    )  # a number even where a compiler knows the length as a symbol
    if chunks == 1:
        return [(length, 1)]
    between = [min(together, chunks - 1 - first) for first in range(1, chunks - 1, together)]
    return [(count * CAUSAL_CHUNK, count) for count in (1, *between)] + [
        (length - (chunks - 1) * CAUSAL_CHUNK, 1)
    ]


def chunks_held(width: int, batch_size: int, heads: int, length: int, like: Tensor) -> int:
    """`together` of `spans`."""
    per_token = width + 3 * CAUSAL_CHUNK  # features, scores, value and row
    return at_a_time(
        max(1, -(-length // CAUSAL_CHUNK)),
        batch_size * heads * CAUSAL_CHUNK * per_token,
        HELD,
        like,
    )


def spans_of(feature_map: FeatureMap, call: Call) -> list[tuple[int, int]]:
    """`spans` of a call with as many queries as keys."""
    q, width = call.q, feature_map.width_of(call.k[:0].to(accumulation_dtype(call.k.dtype)))
    return spans(q.shape[2], chunks_held(width, q.shape[0], q.shape[1], q.shape[2], q))


def causal(
    feature_map: FeatureMap, call: Call, past: Past | None, *, remember_last: bool = False
) -> Iterator[Piece]:
    """Causal attention of as many queries as keys, behind the past. With remember_last the last
    piece has the sums after it."""
    found = spans_of(feature_map, call)
    lengths = [tokens for tokens, _ in found]
    last_id = None
    for place, span in enumerate(call.split(queries=lengths, keys=lengths)):
        remember = remember_last or place < len(found) - 1
        block = Block.of(feature_map, span, past, found[place][1], remember, last_id)
        last_id = None if span.segments is None else span.segments[:, -1]
        yield _piece(call, *block.read(feature_map.normalizer == "row"), past, block.after)
        past = block.after


@dataclass(frozen=True)
class Block:
    """Chunks side by side, before they read their values. Row i of a chunk weighs its own key j by
    exp(log_scale_j - m_i) under its own running maximum m_i, so no later key, however large, can
    push an earlier row out of range (rule 5).

    q, q_features: (batch, kv_heads, chunks, rows, ...), see `grouped`; k, k_features, v: (batch,
    kv_heads, chunks, length, ...), v `with_ones`.
    totals: what the features of a query were divided by to become q_features, (batch, kv_heads,
    chunks, length, width), None: nothing.
    relative: the weights of keys in rows, (batch, kv_heads, chunks, length, length), None where all
    are 1.
    attention: what rows make of their own chunk's values, not yet normalised, (batch, kv_heads,
    chunks, rows, length).
    before: sums that each chunk reads, (batch, kv_heads, chunks, width, value_dim + 1); carry: what
    they are worth to each row, (..., rows, 1). weights: of keys in the sums after their chunk,
    (..., length); shrink: of the sums before it, (batch, kv_heads, chunks). carry, weights and
    shrink are None where they are 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_features: Tensor
    k_features: Tensor
    totals: Tensor | None
    relative: Tensor | None
    attention: Tensor
    before: Tensor | None
    carry: Tensor | None
    weights: Tensor | None
    shrink: Tensor | None
    after: Past | None

    @classmethod
    def of(
        cls,
        feature_map: FeatureMap,
        call: Call,
        past: Past | None,
        chunks: int,
        remember: bool,
        last_id: Tensor | None = None,
    ) -> Block:
        """last_id: of packed rows, the piece that the last token of the past belongs to,
        (batch,)."""
        dtype, kv_heads, group = accumulation_dtype(call.q.dtype), call.k.shape[1], call.group
        q = grouped(call.q.to(dtype), kv_heads, chunks)
        k, v = (
            x.unflatten(2, (chunks, -1)) for x in (call.k.to(dtype), with_ones(call.v.to(dtype)))
        )
        q_features = feature_map.query(q)
        k_features, log_scale = keys_of(feature_map, call.k.to(dtype), call.key_mask)
        k_features = k_features.unflatten(2, (chunks, -1))
        earlier = None if past is None else past.log_scale
        log_scale = None if log_scale is None else log_scale.unflatten(2, (chunks, -1))
        worth, largest = write_chunks(log_scale, earlier, group, remember=remember)
        if feature_map.decay.fades:
            mask = None if call.key_mask is None else call.key_mask.unflatten(1, (chunks, -1))
            count, behind = counted(k.shape[3], mask, k.device), past is not None
            faded = feature_map.decay.of_chunks(
                k_features, count, group, behind=behind, remember=remember
            )
            worth = worth.times(faded)
        if call.segments is not None:
            ids = call.segments.unflatten(1, (chunks, -1))
            worth = worth.times(boundaries.of_chunks(ids, last_id, group, dtype))
        relative, carry, weights, shrink = vars(worth).values()
        totals = None
        if feature_map.normalizer == "feature" and relative is None:
            relative = torch.ones(k.shape[3], k.shape[3], dtype=dtype, device=k.device).tril()[
                None, None, None
            ]
        more = (
            k_features.mT @ (v if weights is None else v * weights[..., None]) if remember else None
        )
        before, after = _sums_of_chunks(past, shrink, more)
        if feature_map.normalizer == "feature":
            totals = feature_totals(relative, k_features, carry, before)
            q_features = (q_features.unflatten(3, (group, -1)) / totals[:, :, :, None]).flatten(
                3, 4
            )
        scores = (q_features @ k_features.mT).unflatten(3, (group, -1))
        if relative is None:
            attention = scores.tril_()
        else:  # in place where no gradient goes to the weights
            attention = (
                scores * relative[:, :, :, None]
                if feature_map.scales_keys
                else scores.mul_(relative[:, :, :, None])
            )
        attention = attention.flatten(3, 4)
        remembered = (
            None if after is None else Past(after, None if largest is None else largest.clone())
        )
        return cls(
            q,
            k,
            v,
            q_features,
            k_features,
            totals,
            relative,
            attention,
            before,
            carry,
            weights,
            shrink,
            remembered,
        )

    def read(self, normalizes: bool) -> tuple[Tensor, Tensor | None]:
        """Rows, not yet normalised, and their normalisers if it normalizes."""
        columns = slice(None if normalizes else -1)
        total = self.attention @ self.v[..., columns]
        if self.before is not None and self.carry is None:
            total = add_product(total, self.q_features, self.before[..., columns])
        elif self.before is not None and self.carry is not None:
            total = torch.addcmul(total, self.q_features @ self.before[..., columns], self.carry)
        return (total[..., :-1], total[..., -1:]) if normalizes else (total, None)


def _sums_of_chunks(
    past: Past | None, shrink: Tensor | None, more: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Sums before each chunk, (batch, kv_heads, chunks, ...), and after the last one, from what
    each chunk adds."""
    if more is None:
        return (None if past is None else past.sums[:, :, None]), None
    sums, before = None if past is None else past.sums, []
    shrinks = [None] * more.shape[2] if shrink is None else shrink.unbind(2)
    for factor, of_chunk in zip(shrinks, more.unbind(2), strict=True):
        before.append(sums)
        sums = added(sums, factor, of_chunk)
    return (None if past is None else torch.stack(before, 2)), sums


def feature_totals(
    relative: Tensor | None, k_features: Tensor, carry: Tensor | None, before: Tensor | None
) -> Tensor:
    """What to divide each feature of a row by, the key feature's sum over the keys that the row
    sees, (batch, kv_heads, chunks, length, width)."""
    assert relative is not None
    sums = relative @ k_features
    if before is not None:
        earlier = before[..., None, :, -1]
        sums = (
            sums.add_(earlier)
            if carry is None
            else sums.addcmul_(carry[..., : sums.shape[3], :], earlier)
        )
    return sums.clamp_(
        min=underflow(sums)
        # As `divisor`, in one pass: no feature is negative, and what is divided is no larger than
        # its total
    )
