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
from attnzoo.engines.linear.gated.gated_chunks import (
    Inside,
    Tokens,
    chunk_of,
    cut,
    in_chunks,
    put,
    scan,
    spans,
)
from attnzoo.engines.linear.gated.through_chunks import (
    through_inside,
    through_prepared,
    through_states,
)
from attnzoo.engines.linear.gated.tokens import Rule, empty_state, prepared, separated
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
    call = separated(rule, call)
    rows = (rows.to(call.q.dtype) for rows, _ in scan(rule, call, None))
    return join(rows, call.query_length, 2, like=call.q)


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
            for rows, state in scan(rule, call, None):
                if state is not None:
                    states.append(state)
                yield rows.to(call.q.dtype)

        out = join(rows(), call.query_length, 2, like=call.q)
        ctx.save_for_backward(*tensors, *states)
        ctx.rule, ctx.declared = rule, declared
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        count = 3 + len(ctx.declared)
        saved = ctx.saved_tensors
        tensors, states = saved[:count], saved[count:]
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
    chunk, dtype = chunk_of(call.key_length), empty_state(call).dtype
    lengths = spans(call, chunk)
    given = {"q": call.q, "k": call.k, "v": call.v, **call.inputs}
    found = {name: torch.empty_like(x) for name, x in given.items()}
    end, d_state = call.key_length, None
    for place in reversed(range(len(lengths))):
        here = slice(end - lengths[place], end)
        span = call.select(queries=here, keys=here).of_each(lambda x, _: x.to(dtype))
        own = {"q": span.q, "k": span.k, "v": span.v, **span.inputs}
        if rule.removes:
            own = {name: x.detach().requires_grad_() for name, x in own.items()}
            span = _call_of(call.declared, *own.values())
        with torch.set_grad_enabled(rule.removes):
            span = in_chunks(span, chunk)
            tokens = Tokens.of(rule, prepared(rule, span))
            followed = Inside.of(tokens)
        inside = followed.detached()
        d_rows = cut(gradient[:, :, here].to(dtype), chunk)
        d_rows = d_rows.unflatten(2, (call.k.shape[1], call.group)).flatten(3, 4)
        state = states[place - 1] if place else empty_state(call)
        d_inside, d_state = through_states(inside, d_rows, state, d_state)
        if rule.removes:
            for name, x in _through_followed(followed, d_inside, own).items():
                found[name][:, :, here] = x
        else:
            made = through_prepared(rule, span, through_inside(tokens, inside, d_inside))
            for name, whole in found.items():
                put(made[name], whole[:, :, here])
        end = here.start
    return list(found.values())


def _through_followed(
    inside: Inside, found: dict[str, Tensor], own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of a span's tensors by autograd, from those of what is made of them."""
    roots = {name: getattr(inside, name) for name in found}
    roots = {name: x for name, x in roots.items() if x.requires_grad}
    some = torch.autograd.grad(
        list(roots.values()),
        list(own.values()),
        [found[name] for name in roots],
        materialize_grads=True,
        allow_unused=True,
    )
    return dict(zip(own, some, strict=True))
