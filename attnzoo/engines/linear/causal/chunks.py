"""Causal linear attention in chunks of tokens.

Inside a chunk, rows weigh keys through a small score matrix; what lies before the chunk they read
as sums over the earlier keys and values. Everything here is written in operators that autograd, a
compiler and a counter of operations can follow. `gradient` computes the same with a backward pass
of its own, which is faster and keeps less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.causal import boundaries
from attnzoo.engines.linear.decay import counted
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.key_weights import write_chunks
from attnzoo.engines.linear.layout import add_product, grouped, ungrouped, with_ones
from attnzoo.engines.linear.sums import Past, added, divisor, keys_of, underflow
from attnzoo.engines.piece_by_piece import at_a_time

CAUSAL_CHUNK = 64  # tokens that see each other through a small score matrix
SHORT = 128  # tokens up to which one score matrix of all takes less time than two chunks
# How many numbers the chunks computed side by side may have together: as many as stay in the
# processor's cache, and as malloc hands out again without asking the system for memory.
HELD = 2**20


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of the output.

    rows: (batch, heads, tokens, value_dim), in q's dtype
    divisor: (batch, heads, tokens, 1), what each row was divided by; None where A has no row sums
    past: the sums over the keys before these rows; None for the first rows
    after: the sums that include these rows' own keys; None where they were not wanted
    """

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
    """Which chunks causal attention computes side by side, in order.

    A short input is one chunk. Of others the first chunk stands alone because it may have no past,
    and the last one because it may be short and its keys need not be added to the sums.

    length: number of tokens
    together: how many of the chunks in between are computed side by side

    Returns a pair (tokens, chunks) for each step.
    """
    if length <= SHORT:
        return [(length, 1)]
    # len(range()) is a plain number even where a compiler knows the length only as a symbol.
    chunks = len(range(0, length, CAUSAL_CHUNK))
    between = [min(together, chunks - 1 - first) for first in range(1, chunks - 1, together)]
    return [(count * CAUSAL_CHUNK, count) for count in (1, *between)] + [
        (length - (chunks - 1) * CAUSAL_CHUNK, 1)
    ]


def chunks_held(width: int, batch_size: int, heads: int, length: int, like: Tensor) -> int:
    """How many chunks to compute side by side, the `together` of `spans`.

    width: number of features of a key
    batch_size, heads, length: sizes of the queries
    like: a tensor on the device of the call
    """
    per_token = width + 3 * CAUSAL_CHUNK  # features, scores, value and row
    return at_a_time(
        max(1, -(-length // CAUSAL_CHUNK)),
        batch_size * heads * CAUSAL_CHUNK * per_token,
        HELD,
        like,
    )


def spans_of(feature_map: FeatureMap, call: Call) -> list[tuple[int, int]]:
    """The `spans` of a call with as many queries as keys, under this feature map."""
    q, width = call.q, feature_map.width_of(call.k[:0].to(accumulation_dtype(call.k.dtype)))
    return spans(q.shape[2], chunks_held(width, q.shape[0], q.shape[1], q.shape[2], q))


def causal(
    feature_map: FeatureMap, call: Call, past: Past | None, *, remember_last: bool = False
) -> Iterator[Piece]:
    """Causal attention of a call with as many queries as keys, piece by piece.

    feature_map: the φ of queries and keys
    call: its query i sees its keys up to i, and everything in the past
    past: the sums over earlier keys and values; None when there are none
    remember_last: whether the last piece, too, needs the sums after it, as decoding does
    """
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
    """Chunks computed side by side, up to the point where their rows are multiplied by values.

    A feature map may give a key as features · exp(log_scale). Row i of a chunk weighs its own key j
    by exp(log_scale_j - m_i), where m_i is the largest log_scale that row i sees: so no later key,
    however large, can push an earlier row out of range.

    Each tensor begins with (batch, kv_heads, chunks); the rest of its shape is given here. A chunk
    has `length` tokens, and `rows` is group · length, since a group of heads shares each key.

    q, q_features: (rows, head_dim) and (rows, width), see `grouped`
    k, k_features: (length, head_dim) and (length, width)
    v: (length, value_dim + 1), whose last column is ones
    totals: (length, width), what the query features were divided by; None: by nothing
    relative: (length, length), the weight of key j in row i of its chunk; None where all are 1
    attention: (rows, length), A inside the chunk before rows are normalised
    before: (width, value_dim + 1), the sums that the chunk reads; None: there are none
    carry: (rows, 1), the weight of `before` in each row; None where it is 1
    weights: (length,), the weight of each key in the sums after the chunk; None where it is 1
    shrink: (), the weight of `before` in the sums after the chunk; None where it is 1
    after: the sums after the last chunk, without a chunks dimension; None where not wanted
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
        """Compute the chunks of a call.

        feature_map: the φ of queries and keys
        call: as many queries as keys, a whole number of chunks of one length
        past: the sums before the first chunk; None when there are none
        chunks: number of chunks in the call
        remember: whether the sums after each chunk are wanted
        last_id: (batch,), in rows that pack several sequences, the sequence that the last token of
            the past belongs to; None without packing or past
        """
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
        else:
            # In place where no gradient goes to the weights.
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
        """Multiply by the values.

        normalizes: whether each row will be divided by its sum

        Returns the rows before normalisation, (batch, kv_heads, chunks, rows, value_dim), and their
        sums, (..., rows, 1), or None unless `normalizes`.
        """
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
    """Add up the chunks' sums in order.

    past: the sums before the first chunk; None when there are none
    shrink: (batch, kv_heads, chunks), what each chunk multiplies earlier sums by; None: 1
    more: (batch, kv_heads, chunks, width, value_dim + 1), what each chunk adds; None when the sums
        after the chunks are not wanted, which only a single chunk allows

    Returns the sums before each chunk, of the shape of `more`, and those after the last one,
    (batch, kv_heads, width, value_dim + 1). Either is None where there is none.
    """
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
    """What each query feature is divided by under the normalizer "feature": the sum of that feature
    over the keys that the row sees.

    relative, k_features, carry, before: as in `Block`; relative must not be None

    Returns (batch, kv_heads, chunks, length, width).
    """
    assert relative is not None
    sums = relative @ k_features
    if before is not None:
        earlier = before[..., None, :, -1]
        sums = (
            sums.add_(earlier)
            if carry is None
            else sums.addcmul_(carry[..., : sums.shape[3], :], earlier)
        )
    # A clamp does what `divisor` does, in one pass: no feature is negative, and what will be
    # divided is no larger than its total.
    return sums.clamp_(min=underflow(sums))
