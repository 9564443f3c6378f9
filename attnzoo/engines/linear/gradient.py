"""Linear attention with a backward pass of its own.

It keeps the inputs, the output, what each row was divided by and some sums over keys, and computes
features and scores again, so that nothing as wide as the features of all tokens is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.call import Call
from attnzoo.eager import is_recorded, only_autograd_looks
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.linear import bidirectional
from attnzoo.engines.linear.bidirectional import Rows
from attnzoo.engines.linear.causal import causal_gradient
from attnzoo.engines.linear.causal.causal_gradient import causal_pieces
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.sums import Past, absorb, read_all
from attnzoo.engines.piece_by_piece import join

Pasts = Sequence[Past | None]


class Way(NamedTuple):
    """How A·v is computed, and its gradients.

    forward: gives A·v, what its rows were divided by (None: nothing), and sums over keys
    backward: gives the gradients of q, k and v, from those of the rows and the same sums
    """

    forward: Callable[[FeatureMap, Call], tuple[Tensor, Tensor | None, Sequence[Past | None]]]
    backward: Callable[
        [FeatureMap, Call, Rows, Sequence[Past | None]], tuple[Tensor, Tensor, Tensor]
    ]


CHUNKED = Way(causal_gradient.forward, causal_gradient.backward)
WHOLE = Way(bidirectional.forward, bidirectional.backward)


def attend(feature_map: FeatureMap, call: Call) -> Tensor:
    """A·v of a call that `why_not` accepts; a causal one has at most as many queries as keys."""
    with without_autocast(call.q.device):
        if is_learned(call):
            made_by = feature_map.for_keys(call.k) if call.is_causal else feature_map
            return learned(made_by, call, CHUNKED if call.is_causal else WHOLE)
        if call.is_causal:
            return _in_open_operators(feature_map, call)
        return bidirectional.forward(feature_map, call)[0]


def is_learned(call: Call) -> bool:
    """Whether gradients may be asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))


def learned(feature_map: FeatureMap, call: Call, way: Way) -> Tensor:
    """A·v with the backward pass of a way."""
    return _Attend.apply(call.q, call.k, call.v, call.key_mask, feature_map, call.frame(), way)


def why_not(feature_map: FeatureMap, call: Call) -> str | None:
    """Why an autograd.Function of this library may not compute the call; None when it may."""
    if call.q.is_meta or is_recorded() or not only_autograd_looks(call.q, call.k, call.v):
        return "a graph or transform must see the operators inside"
    if torch.is_grad_enabled() and not feature_map.has_vjp:
        return "only autograd knows the derivative of this feature map"
    return None


def attend_openly(feature_map: FeatureMap, call: Call) -> Tensor:
    """As `attend`, in operators that autograd, a recorded graph or torch.func can follow."""
    if is_recorded():
        return _in_open_operators(feature_map, call)
    with without_autocast(call.q.device):
        return _in_open_operators(feature_map, call)


def _in_open_operators(feature_map: FeatureMap, call: Call) -> Tensor:
    feature_map = feature_map.for_keys(call.k)
    if call.is_causal:
        rows = (piece.rows for piece in causal_pieces(feature_map, call))
    else:
        past = absorb(feature_map, call.k, call.v, call.key_mask, None)
        rows = read_all(feature_map, call, past)
    return join(rows, call.query_length, 2, like=call.q)


class _Attend(torch.autograd.Function):
    """`attend` with the backward pass that this file describes."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        feature_map: FeatureMap,
        frame: Callable[..., Call],
        way: Way,
    ) -> Tensor:
        call = frame(q, k, v)
        out, divisors, pasts = way.forward(feature_map, call)
        normalized = (None, None) if divisors is None else (out, divisors)
        kept = [
            x
            for past in pasts
            for x in ((None, None) if past is None else (past.sums, past.log_scale))
        ]
        # Buffers are saved too, so that torch notices if one is changed (random features drawn
        # anew) before the backward pass reads it.
        ctx.save_for_backward(q, k, v, key_mask, *normalized, *kept, *feature_map.buffers())
        ctx.feature_map, ctx.frame, ctx.way, ctx.kept = feature_map, frame, way, len(kept)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, out, divisor, *kept = ctx.saved_tensors
        call = ctx.frame(q, k, v)
        (gradient,) = gradients
        if is_followed(gradient):
            feature_map, frame = ctx.feature_map, ctx.frame
            found = open_gradients(
                lambda q, k, v: _in_open_operators(feature_map, frame(q, k, v)),
                (q, k, v),
                gradient,
            )
        else:
            sums, log_scales = kept[: ctx.kept : 2], kept[1 : ctx.kept : 2]
            pasts = [
                None if one is None else Past(one, log_scale)
                for one, log_scale in zip(sums, log_scales, strict=True)
            ]
            rows = Rows(gradient, out, divisor)
            with without_autocast(q.device):
                found = ctx.way.backward(ctx.feature_map, call, rows, pasts)
        return *found, None, None, None, None
