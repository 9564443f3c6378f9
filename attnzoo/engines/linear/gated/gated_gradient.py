"""Gates and delta rules with a backward pass that keeps the inputs and a few states.

It keeps q, k, v, the gates and the state before each span, a run of chunks that are computed side
by side, and computes everything else again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.call import Call
from attnzoo.eager import is_recorded, only_autograd_looks
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.linear.gated.gated_chunks import attend as attend_chunks
from attnzoo.engines.linear.gated.gated_chunks import chunk_of, scan, spans
from attnzoo.engines.linear.gated.tokens import Rule, prepared
from attnzoo.engines.piece_by_piece import join
from attnzoo.spec import Input


def attend(rule: Rule, call: Call) -> Tensor:
    """A·v of a call that `why_not` accepts, with as many queries as keys."""
    with without_autocast(call.q.device):
        given = [x for _, x in call.given()]
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (call.q, call.k, call.v, *given)
        ):
            declared = tuple(one for one, _ in call.given())
            return _Attend.apply(rule, declared, call.q, call.k, call.v, *given)
        return _in_open_operators(rule, call)


def why_not(call: Call) -> str | None:
    """Why an autograd.Function of this library may not compute the call; None when it may."""
    tensors = (call.q, call.k, call.v, *call.inputs.values())
    if call.q.is_meta or is_recorded() or not only_autograd_looks(*tensors):
        return "a graph or transform must see the operators inside"
    return None


def attend_openly(rule: Rule, call: Call) -> Tensor:
    """As `attend`, in operators that autograd, a recorded graph or torch.func can follow."""
    if is_recorded():
        return _in_open_operators(rule, call)
    with without_autocast(call.q.device):
        return _in_open_operators(rule, call)


def _in_open_operators(rule: Rule, call: Call) -> Tensor:
    rows = (rows.to(call.q.dtype) for rows, _ in scan(rule, prepared(rule, call), None))
    return join(rows, call.query_length, 2)


def _call_of(declared: tuple[Input, ...], q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Call:
    inputs = {one.name: x for one, x in zip(declared, given, strict=True)}
    return Call(q, k, v, is_causal=True, inputs=inputs, declared=declared)


class _Attend(torch.autograd.Function):
    """`attend` with the backward pass that this file describes."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, declared: tuple[Input, ...], *tensors: Tensor) -> Tensor:
        call = _call_of(declared, *tensors)
        states: list[Tensor] = []

        def rows() -> Iterator[Tensor]:
            for rows, state in scan(rule, prepared(rule, call), None):
                if state is not None:
                    states.append(state)
                yield rows.to(call.q.dtype)

        out = join(rows(), call.query_length, 2)
        ctx.save_for_backward(*tensors, *states)
        ctx.rule, ctx.declared = rule, declared
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        count = 3 + len(ctx.declared)
        tensors, states = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if is_followed(gradient):
            rule, declared = ctx.rule, ctx.declared
            found = open_gradients(
                lambda *given: _in_open_operators(rule, _call_of(declared, *given)),
                tensors,
                gradient,
            )
        else:
            call = _call_of(ctx.declared, *tensors)
            with without_autocast(gradient.device):
                found = _backward(ctx.rule, call, gradient, states)
        return None, None, *found


def _backward(rule: Rule, call: Call, gradient: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of q, k, v and the gates, span by span from the end, carrying the gradient of the
    state that later spans read. states: before each span but the first."""
    lengths, chunk = spans(call), chunk_of(call.key_length)
    parts = call.split(queries=lengths, keys=lengths)
    tensors = (call.q, call.k, call.v, *(x for _, x in call.given()))
    found = [torch.empty_like(x) for x in tensors]
    zeros = call.k.new_zeros(0)
    d_state: Tensor | None = None
    end = call.key_length
    for place in reversed(range(len(parts))):
        start = end - lengths[place]
        with torch.enable_grad():
            own = [
                x.detach().requires_grad_()
                for x in (
                    parts[place].q,
                    parts[place].k,
                    parts[place].v,
                    *(x for _, x in parts[place].given()),
                )
            ]
            part = prepared(rule, _call_of(call.declared, *own))
            if place:
                state = states[place - 1].detach().requires_grad_()
            else:
                state = part.k.new_zeros(*part.k.shape[:2], part.k.shape[3], part.v.shape[3])
                state.requires_grad_()
            rows, after = attend_chunks(rule, part, state, chunk, d_state is not None)
        outs, grads = [rows], [gradient[:, :, start:end].to(rows.dtype)]
        if d_state is not None:
            outs.append(after)
            grads.append(d_state)
        *of_own, d_state = torch.autograd.grad(
            outs, [*own, state], grads, materialize_grads=True, allow_unused=True
        )
        for whole, x in zip(found, of_own, strict=True):
            whole[:, :, start:end] = x
        end = start
    return found
