"""Backend `native`: what `tiles` does, by one compiled operator for the forward pass and one for
the backward pass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.differentiable import Compute, is_followed, open_gradients
from attnzoo.engines.native import library
from attnzoo.engines.native.library import cannot_compile, in_rows, operators
from attnzoo.engines.softmax.native.tile_plan import TilePlan, plan_of
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles import tiles
from attnzoo.engines.softmax.tiles.tile_pieces import InPieces, Way

#: From how many rows on it is faster than one call of SDPA under a dense mask. Measured by
#: `benchmarks/short_inputs.py`.
FEWEST_ROWS = 32


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why the compiled operators refuse the call; None when they take it."""
    if call.q.dtype not in tiles.DTYPES:
        return f"sums of {call.q.dtype} run in float32, and compiled tiles have one dtype"
    if engine.softcap is not None:
        return "it has no softcap"
    if "distance_bias" in call.inputs:
        return "it has no distance_bias"
    return tiles.cannot_work_alone(engine, call) or cannot_compile()


def passed_over(call: Call) -> str | None:
    """Why backend="auto" passes over it; None where it does not."""
    reason = library.not_compiled()
    if reason is not None:
        return reason
    if call.query_length < FEWEST_ROWS:
        return f"{call.query_length} rows are fewer than the {FEWEST_ROWS} from which on it is fast"
    return None


def attend(engine: SoftmaxReference, call: InPieces) -> Tensor:
    """A·v of a call in pieces, as `Way.attend`, without what `why_not` refuses."""
    plan = plan_of(call.pieces(call.q, call.table), call.k.shape[2], call.q.dtype)
    given = (call.q, call.k, call.v, call.key_mask, call.sink_logits)
    return by_plan(engine, given, plan, call.compute)


def by_plan(
    engine: SoftmaxReference,
    given: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    plan: TilePlan,
    compute: Compute,
) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim).

    engine: gives the scale
    given: q, k, v, key_mask and sink_logits, as `InPieces` has them
    plan: which rows meet which keys
    compute: as `InPieces` has it
    """
    q = given[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return _Attend.apply(*given, plan, engine.scale_of(q), compute)
    return _computed(*given, plan, engine.scale_of(q))[0]


def _computed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    sink_logits: Tensor | None,
    plan: TilePlan,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A·v, and the logarithms of the sums of rows, (batch, heads, query_length)."""
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    logits = None if sink_logits is None else sink_logits.to(q.dtype).contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    return operators().native_attention(q, k, v, key_mask, logits, list(plan), scale)


def all_parts(size: int, keys: int, threads: int | None = None) -> int:
    """Every part in one piece: the operator itself cuts the work."""
    return sys.maxsize


COMPILED = Way(attend, all_parts)


class _Attend(torch.autograd.Function):
    """`attend`, and its gradients by the compiled backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        sink_logits: Tensor | None,
        plan: TilePlan,
        scale: float,
        compute: Compute,
    ) -> Tensor:
        out, log_sums = _computed(q, k, v, key_mask, sink_logits, plan, scale)
        ctx.save_for_backward(q, k, v, key_mask, sink_logits, out, log_sums)
        ctx.plan, ctx.scale, ctx.compute = plan, scale, compute
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, sink_logits, out, log_sums = ctx.saved_tensors
        if is_followed(gradients[0]):
            *to_qkv, to_logits = open_gradients(ctx.compute, (q, k, v, sink_logits), gradients[0])
            return *to_qkv, None, to_logits, *[None] * 3
        q, k, v = in_rows(q), in_rows(k), in_rows(v)
        key_mask = None if key_mask is None else key_mask.contiguous()
        sent, to_logits = gradients[0].contiguous(), None
        found = operators().native_attention_backward(
            sent, out, log_sums, q, k, v, key_mask, list(ctx.plan), ctx.scale
        )
        if sink_logits is not None:
            # The slopes of a row and of its logit sum to 0, for one number added to all of them
            # changes nothing; the weight of the logit is what the row's weights lack to 1.
            share = (sink_logits.to(q.dtype)[:, None] - log_sums).exp_()
            to_logits = -(share * (sent * out).sum(-1)).sum((0, 2)).to(sink_logits.dtype)
        return *found, None, to_logits, *[None] * 3
