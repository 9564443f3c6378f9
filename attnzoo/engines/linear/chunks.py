"""The linear engine's matrix products, in chunks of tokens: whatever is as wide as the features is
held for some tokens only.

Written in operators that autograd, a compiler and a counter can follow. `linear_gradient` has the
same backward, faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.exponential import exp_
from attnzoo.engines.joining import at_a_time
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.layout import add_product, grouped, ungrouped, with_ones
from attnzoo.ordering import running_maximum

CAUSAL_CHUNK = 64  # tokens that see each other through a small score matrix
CHUNK = 512  # tokens whose features are held at a time where nobody sees anybody
HELD = (
    2**20
    # Numbers that causal chunks computed side by side may have: what a cache holds, and malloc
    # keeps for the next ones
)


@dataclass(frozen=True)
class Past:
    """The keys and values so far, summed: Σ_j φ(k_j) [v_j, 1]ᵀ, divided by exp(log_scale).

    sums: (batch, kv_heads, width, value_dim + 1), its last column the normaliser. log_scale:
    (batch, kv_heads), the largest of any key so far; None where keys have none.
    """

    sums: Tensor
    log_scale: Tensor | None


@dataclass(frozen=True)
class Piece:
    """Some rows of the output, (batch, heads, tokens, value_dim), what each was divided by (None:
    nothing), and the sums that they read and that they left."""

    rows: Tensor
    divisor: Tensor | None
    past: Past | None
    after: Past | None = None


def keys_of(
    feature_map: FeatureMap, k: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Features of keys and their log_scale (None: 0). A padded key has no features, or a log_scale
    of -inf."""
    features, log_scale = feature_map.key(k)
    if key_mask is None:
        return features, log_scale
    padded = ~key_mask[:, None]
    if log_scale is None:
        return features.masked_fill(padded[..., None], 0.0), None
    return features, log_scale.masked_fill(padded, float("-inf"))


def finite(stabiliser: Tensor) -> Tensor:
    """-inf (no key yet) becomes the lowest finite number, so that -inf - stabiliser is -inf and not
    NaN."""
    return stabiliser.clamp(min=torch.finfo(stabiliser.dtype).min)


def divisor(normalizer: Tensor) -> Tensor:
    """The normaliser to divide by: inf, so that the quotient is 0, where it is 0 (a row with
    nothing to see), or so small that only underflow can have left it, since its reciprocal would
    overflow in the backward pass."""
    return normalizer.masked_fill(normalizer.abs() < underflow(normalizer), float("inf"))


def underflow(x: Tensor) -> float:
    """What a normaliser of x's dtype must reach to be more than what underflow left of it."""
    return torch.finfo(x.dtype).tiny ** 0.8


def absorb(
    feature_map: FeatureMap,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    past: Past | None,
    tokens: int = CHUNK,
) -> Past:
    """Add keys and values to the past, some tokens at a time, under a running maximum of their
    log_scale."""
    dtype = accumulation_dtype(k.dtype)
    for start, keys, values in zip(
        range(0, k.shape[2], tokens), k.split(tokens, 2), v.split(tokens, 2), strict=True
    ):
        mask = None if key_mask is None else key_mask[:, start : start + tokens]
        features, log_scale = keys_of(feature_map, keys.to(dtype), mask)
        weights = shrink = largest = None
        if log_scale is not None:
            largest = log_scale.detach().amax(-1)
            if past is not None and past.log_scale is not None:
                largest = torch.maximum(largest, past.log_scale)
                shrink = (past.log_scale - finite(largest)).exp()
            weights = exp_(log_scale - finite(largest)[..., None])
        if feature_map.fades:
            fresh, faded = fading(
                feature_map.decay(features), counted(keys.shape[2], mask, keys.device)
            )
            weights, shrink = fresh[:, :, 0], faded[:, :, 0]
        past = Past(
            _added(
                None if past is None else past.sums,
                shrink,
                summed(features, weights, values.to(dtype)),
            ),
            largest,
        )
        del features  # before the next ones stand
    assert past is not None
    return past


def summed(features: Tensor, weights: Tensor | None, v: Tensor) -> Tensor:
    """Σ_j weights_j φ(k_j) [v_j, 1]ᵀ over the second last dimension."""
    if weights is None:
        return torch.cat([features.mT @ v, features.sum(-2)[..., None]], -1)
    return torch.cat(
        [features.mT @ (v * weights[..., None]), (weights[..., None, :] @ features).mT], -1
    )


def counted(length: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Real tokens of a chunk up to each, itself included, (batch or 1, chunks or 1, length).

    key_mask: (batch, chunks, length), or of one chunk (batch, length).
    """
    if key_mask is None:
        return torch.arange(1, length + 1, device=device)[None, None]
    count = key_mask.cumsum(-1)
    return count if count.dim() == 3 else count[:, None]


def fading(gamma: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """What tokens are worth behind the last of them, (batch or 1, kv_heads, chunks or 1, length),
    and what came before them, (batch or 1, kv_heads, chunks or 1): γ for every real token since.

    gamma: (kv_heads,). count: `counted`, (batch or 1, chunks or 1, length).
    """
    base, last = gamma[:, None, None], count[:, None, :, -1:]
    return base ** (last - count[:, None]), (base**last)[..., 0]


def _added(sums: Tensor | None, shrink: Tensor | None, more: Tensor) -> Tensor:
    if sums is None:
        return more
    return sums + more if shrink is None else torch.addcmul(more, sums, shrink[..., None, None])


def bidirectional(feature_map: FeatureMap, call: Call) -> Iterator[Piece]:
    """Every query reads the sums over all keys."""
    return read_all(feature_map, call, absorb(feature_map, call.k, call.v, call.key_mask, None))


def read_all(feature_map: FeatureMap, call: Call, past: Past) -> Iterator[Piece]:
    """Every query of the call reads the same past."""
    sums = read_sums(feature_map, past.sums)[:, :, None]
    for queries in call.q.split(CHUNK, 2):
        q = grouped(queries.to(sums.dtype), call.k.shape[1], 1)
        total = feature_map.query(q) @ sums
        if feature_map.normalizer == "row":
            yield _piece(call, total[..., :-1], total[..., -1:], past)
        else:
            yield _piece(call, total, None, past)


def read_sums(feature_map: FeatureMap, sums: Tensor) -> Tensor:
    """What the features of a query are multiplied by: the last column is the normaliser's, and
    there only where a row has one."""
    if feature_map.normalizer == "row":
        return sums
    values = sums[..., :-1]
    return values / divisor(sums[..., -1:]) if feature_map.normalizer == "feature" else values


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
    for place, span in enumerate(call.split([tokens for tokens, _ in found])):
        remember = remember_last or place < len(found) - 1
        block = Block.of(feature_map, span, past, found[place][1], remember)
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
        cls, feature_map: FeatureMap, call: Call, past: Past | None, chunks: int, remember: bool
    ) -> Block:
        dtype, kv_heads, group = accumulation_dtype(call.q.dtype), call.k.shape[1], call.group
        q = grouped(call.q.to(dtype), kv_heads, chunks)
        k, v = (
            x.unflatten(2, (chunks, -1)) for x in (call.k.to(dtype), with_ones(call.v.to(dtype)))
        )
        q_features = feature_map.query(q)
        k_features, log_scale = keys_of(feature_map, call.k.to(dtype), call.key_mask)
        k_features = k_features.unflatten(2, (chunks, -1))
        relative = carry = weights = shrink = largest = totals = None
        if log_scale is not None:
            log_scale = log_scale.unflatten(2, (chunks, -1))
            running = running_maximum(log_scale.detach())
            largest = running[..., -1]  # after each chunk
            if past is not None:
                assert past.log_scale is not None
                largest = running_maximum(torch.maximum(largest, past.log_scale[..., None]))
                earlier = torch.cat([past.log_scale[..., None], largest[..., :-1]], -1)
                running = torch.maximum(running, earlier[..., None])
                carry = (
                    (earlier[..., None] - finite(running))
                    .exp()[..., None, :]
                    .expand(-1, -1, -1, group, -1)
                    .flatten(3)[..., None]
                )
                shrink = (earlier - finite(largest)).exp() if remember else None
            relative = exp_(
                (log_scale[..., None, :] - finite(running)[..., None]).clamp_(max=0)
            ).tril()  # a later key may be larger
            weights = exp_(log_scale - finite(largest)[..., None]) if remember else None
        if feature_map.fades:
            gamma = feature_map.decay(k_features)
            mask = None if call.key_mask is None else call.key_mask.unflatten(1, (chunks, -1))
            count = counted(k.shape[3], mask, k.device)
            fresh, faded = fading(gamma, count)
            since = (count[..., :, None] - count[..., None, :]).clamp(min=0)
            relative = (gamma[:, None, None, None] ** since[:, None]).tril()
            if past is not None:
                carry = (gamma[:, None, None] ** count[:, None]).repeat(1, 1, 1, group)[..., None]
            weights, shrink = (fresh, faded.expand(-1, -1, chunks)) if remember else (None, None)
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
            None
            if after is None
            else Past(after, None if largest is None else largest[..., -1].clone())
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
    for factor, added in zip(shrinks, more.unbind(2), strict=True):
        before.append(sums)
        sums = _added(sums, factor, added)
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
