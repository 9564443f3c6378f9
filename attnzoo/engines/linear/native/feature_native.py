"""Backend `native` of kernel attention: causal features of keys and queries by compiled operators.

A key's log_scale, and what it fades by, become gates: the state holds keys divided by exp of the
largest log_scale so far, m, so a token lets it fade by m of the token before less its own m, never
above 0, and writes its key times exp(log_scale - m). Features are made for some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.exponential import exp_
from attnzoo.engines.linear import gradient
from attnzoo.engines.linear.bidirectional import Rows, backward_absorb, visible
from attnzoo.engines.linear.causal.causal_gradient import parts_of
from attnzoo.engines.linear.feature_maps import FeatureMap, Pointwise, elu_plus_one
from attnzoo.engines.linear.gradient import Way, is_learned, learned
from attnzoo.engines.linear.key_weights import finite
from attnzoo.engines.linear.layout import with_ones
from attnzoo.engines.linear.native import compiled_recurrence
from attnzoo.engines.linear.native.compiled_recurrence import SPAN, Found, Recurrence, Tokens
from attnzoo.engines.linear.sums import Past, absorb, keys_of
from attnzoo.engines.piece_by_piece import join
from attnzoo.sequences.ordering import running_maximum

#: How many numbers the features of keys made at a time may have: what stays in a shared cache.
HELD = 2**20


def why_not(feature_map: FeatureMap, call: Call) -> str | None:
    """Why the compiled operators may not compute the call; None when they may."""
    if not call.is_causal:
        return "it is for causal calls"
    if feature_map.normalizer == "feature":
        return "it normalises rows, not features"
    return gradient.why_not(feature_map, call) or compiled_recurrence.why_not(call)


def attend(feature_map: FeatureMap, call: Call) -> Tensor:
    """A·v of a call that `why_not` accepts, with at most as many queries as keys."""
    with without_autocast(call.q.device):
        made_by = feature_map.for_keys(call.k)
        if is_learned(call):
            return learned(made_by, call, NATIVE)
        return _forward(made_by, call, remember=False)[0]


def carried(
    feature_map: FeatureMap, call: Call, past: Past | None
) -> Iterator[tuple[Tensor, Past]]:
    """Some rows at a time, in q's dtype, and the past after them, without gradients.

    call: as many queries as keys
    past: the sums over the tokens before; None when there are none
    """
    operation, lengths = _operation(feature_map, call), _lengths(feature_map, call)
    state, largest = (None, None) if past is None else (past.sums, past.log_scale)
    parts = call.split(queries=lengths, keys=lengths) if len(lengths) > 1 else [call]
    for part in parts:
        tokens, largest = _tokens_of(feature_map, part, largest)
        if not operation.normalizes:  # the past has the sums of rows all the same
            tokens = tokens._replace(v=with_ones(tokens.v))
        found = operation.forward(tokens, state, remember=False)
        state, rows = found.after, found.rows
        rows = rows if operation.normalizes else rows[..., :-1]
        yield rows.to(call.q.dtype), Past(state, largest)


def _tokens_of(
    feature_map: FeatureMap, call: Call, earlier: Tensor | None
) -> tuple[Tokens, Tensor | None]:
    """What the operators take of some tokens without gradients, and the largest log_scale behind
    them. earlier: as `Span.of` has it."""
    if call.key_length == 1 and call.key_mask is None and not feature_map.decay.fades:
        dtype = accumulation_dtype(call.q.dtype)
        made = feature_map.of_one_token(call.q.to(dtype), call.k.to(dtype), earlier)
        if made is not None:
            q, k, fades, largest = made
            return Tokens(q, k, call.v.to(dtype), fades), largest
    span = Span.of(feature_map, call, earlier)
    return span.tokens, span.largest


@dataclass(frozen=True)
class Span:
    """Some tokens, as the operators take them.

    call: of these tokens, with q, k and v in the dtype of sums
    features: of its keys, (batch, kv_heads, length, width)
    weights: what these were multiplied by, (batch, kv_heads, length); None: nothing
    tokens: what the operators take
    largest: the largest log_scale so far, (batch, kv_heads); None where keys have none
    """

    call: Call
    features: Tensor
    weights: Tensor | None
    tokens: Tokens
    largest: Tensor | None

    @classmethod
    def of(cls, feature_map: FeatureMap, call: Call, earlier: Tensor | None) -> Span:
        """earlier: the largest log_scale before the call; None where there is none."""
        dtype = accumulation_dtype(call.q.dtype)
        faded = feature_map.decay.of_tokens(call, dtype)
        if has_elu_inside(feature_map):
            q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
            return cls(call, k, None, Tokens(q, k, v, faded, key_mask=call.key_mask), None)
        call = call.over(call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), call.key_mask)
        features, log_scale = keys_of(feature_map, call.k, call.key_mask)
        keys, weights, largest, log_decay = features, None, None, None
        if log_scale is not None:
            running = running_maximum(log_scale.detach())
            if earlier is not None:
                running = torch.maximum(running, earlier[..., None])
            first = running[..., :1] if earlier is None else earlier[..., None]
            before = torch.cat([first, running[..., :-1]], -1)
            weights = exp_(log_scale - finite(running))
            keys, largest = features * weights[..., None], running[..., -1]
            log_decay = (finite(before) - finite(running)).clamp(max=0)
        if faded is not None:
            log_decay = faded if log_decay is None else log_decay + faded
        q, mask = feature_map.query(call.q), call.key_mask
        tokens = Tokens(q, keys, call.v, log_decay, key_mask=mask)
        return cls(call, features, weights, tokens, largest)


def _lengths(feature_map: FeatureMap, call: Call) -> list[int]:
    """How many tokens are taken at a time."""
    if call.key_length == 1 or has_elu_inside(feature_map):
        return [call.key_length]
    k, length = call.k, call.key_length
    width = feature_map.width_of(k[:0].to(accumulation_dtype(k.dtype)))
    numbers = max(1, call.q.shape[0] * call.q.shape[1] * width)
    together = max(1, HELD // numbers // SPAN) * SPAN
    return [min(together, length - start) for start in range(0, length, together)]


def has_elu_inside(feature_map: FeatureMap) -> bool:
    """Whether the operators make the features."""
    return isinstance(feature_map, Pointwise) and feature_map.function is elu_plus_one


def _operation(feature_map: FeatureMap, call: Call) -> Recurrence:
    return Recurrence(normalizes=feature_map.normalizer == "row", elu=has_elu_inside(feature_map))


def _forward(
    feature_map: FeatureMap, call: Call, *, remember: bool
) -> tuple[Tensor, Tensor | None, list[Past | None]]:
    """A·v, what its rows were divided by (None: nothing); and, where they are to be remembered, the
    states and the largest log_scale before each span, behind the sums over the early keys."""
    early, late = parts_of(call)
    operation, past = _operation(feature_map, call), None
    if early is not None:
        past = absorb(feature_map, early.k, early.v, early.key_mask, None)
    lengths = _lengths(feature_map, late)
    state = None if past is None else _columns(operation, past.sums)
    largest = None if past is None else past.log_scale
    rows, divisors, pasts = [], [], [past]
    for part in late.split(queries=lengths, keys=lengths):
        span = Span.of(feature_map, part, largest)
        found = operation.forward(span.tokens, state, remember=remember)
        rows.append(found.rows.to(call.q.dtype))
        divisors.append(found.divisors[..., None])
        pasts.append(Past(found.states, largest))
        state, largest = found.after, span.largest
    out = join(iter(rows), late.query_length, 2, like=call.q)
    divided_by = torch.cat(divisors, 2) if operation.normalizes and divisors else None
    return out, divided_by, pasts


def _columns(operation: Recurrence, sums: Tensor) -> Tensor:
    """Of sums, whose last column makes the normaliser, those that the operators carry."""
    return sums if operation.normalizes else sums[..., :-1]


def _backward(
    feature_map: FeatureMap, call: Call, rows: Rows, pasts: Sequence[Past | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, span by span from the end. pasts: of `_forward`."""
    d_q, d_k, d_v = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    early, late = parts_of(call)
    operation, d_state, end = _operation(feature_map, call), None, late.query_length
    for length, past in zip(
        reversed(_lengths(feature_map, late)), reversed(pasts[1:]), strict=True
    ):
        assert past is not None
        here = slice(end - length, end)
        there = slice(call.offset + here.start, call.offset + here.stop)
        span = Span.of(feature_map, late.select(queries=here, keys=here), past.log_scale)
        dtype = span.features.dtype
        out, divisor = (
            rows.gradient.new_empty(0, dtype=dtype) if x is None else x[:, :, here].to(dtype)
            for x in (rows.out, rows.divisor)
        )
        found = Found(out, divisor, past.sums, past.sums)
        sent = rows.gradient[:, :, here].to(dtype)
        made, d_state = operation.backward(span.tokens, found, sent, d_state)
        if operation.elu:
            d_q[:, :, here], d_k[:, :, there] = made.q, made.k
        else:
            d_q[:, :, here] = feature_map.query_vjp(span.call.q, span.tokens.q, made.q)
            d_k[:, :, there] = _through_keys(feature_map, span, made.k)
        d_v[:, :, there] = made.v
        end = here.start
    if early is not None:
        past = pasts[0]
        assert past is not None and d_state is not None
        d_sums = d_state if operation.normalizes else F.pad(d_state, (0, 1))
        backward_absorb(
            feature_map, early, past, d_sums, d_k[:, :, : call.offset], d_v[:, :, : call.offset]
        )
    return d_q, d_k, d_v


def _through_keys(feature_map: FeatureMap, span: Span, d_keys: Tensor) -> Tensor:
    """The gradient of k from that of what the operators took for keys."""
    d_log_scale = None
    if span.weights is not None:
        if feature_map.scale_has_gradient:
            d_log_scale = (d_keys * span.tokens.k).sum(-1)
        d_keys = d_keys * span.weights[..., None]
    d_features = visible(d_keys, span.call.key_mask)
    return feature_map.vjp(span.call.k, span.features, d_features, d_log_scale)


NATIVE = Way(lambda feature_map, call: _forward(feature_map, call, remember=True), _backward)
