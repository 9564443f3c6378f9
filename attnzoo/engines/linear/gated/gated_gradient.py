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
    States,
    chunk_of,
    filled,
    scan,
    spans,
)
from attnzoo.engines.linear.gated.tokens import Rule, empty_state, prepared, separated
from attnzoo.engines.linear.layout import add_product_, grouped
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
            for rows, state in scan(rule, call, None):
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
    given = (call.q, call.k, call.v, *(x for _, x in call.given()))
    found = [torch.empty_like(x) for x in given]
    end, d_state = call.key_length, None
    for place in reversed(range(len(lengths))):
        here = slice(end - lengths[place], end)
        own = [x[:, :, here].detach().requires_grad_() for x in given]
        with torch.enable_grad():
            span = prepared(rule, _call_of(call.declared, *own))
            inside = Inside.of(rule, span, chunk)
        state = states[place - 1] if place else empty_state(call)
        d_rows = gradient[:, :, here].to(state.dtype)
        d_inside, d_state = through_states(
            inside, _filled_rows(d_rows, call, chunk), state, d_state
        )
        roots = {name: x for name, x in vars(inside).items() if x is not None}
        wanted = [(roots[name], d) for name, d in d_inside.items() if roots[name].requires_grad]
        of_own = torch.autograd.grad(
            [x for x, _ in wanted], own, [d for _, d in wanted], allow_unused=True
        )
        for whole, x in zip(found, of_own, strict=True):
            if x is None:
                whole[:, :, here] = 0
            else:
                whole[:, :, here] = x
        end = here.start
    return found


def _filled_rows(d_rows: Tensor, call: Call, chunk: int) -> Tensor:
    """The gradient of some rows, laid out as `Inside.rows`."""
    length = d_rows.shape[2]
    chunks = len(range(0, length, chunk))
    return grouped(filled(d_rows, chunks * chunk - length), call.k.shape[1], chunks).contiguous()


def through_states(
    inside: Inside, d_rows: Tensor, state: Tensor, d_after: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the tensors of `Inside` by name, and of the state before the first chunk.

    d_rows: gradient of its rows
    state: before the first chunk
    d_after: gradient of the state after the last chunk; None when nothing reads it
    """
    inside = inside.detached()
    inverse = inside.solved()
    states = States.of(inside, inverse, state, remember=False)
    before, writes, erased = states.before, states.writes, states.erased
    d_writes, d_before = inside.scores.mT @ d_rows, inside.reads.mT @ d_rows
    if d_after is None:
        d_after = torch.zeros_like(state)
    d_later = torch.empty_like(before)  # gradients of the states after each chunk
    kept, d_written = inside.kept, d_writes
    for chunk in reversed(range(d_rows.shape[2])):
        d_later[:, :, chunk] = d_after
        add_product_(d_written[:, :, chunk], inside.handed_on[:, :, chunk], d_after)
        faded = d_after if kept is None else d_after * kept[:, :, chunk]
        d_after = faded + d_before[:, :, chunk]
        if erased is not None:
            add_product_(d_after, erased[:, :, chunk].mT, d_written[:, :, chunk], -1)
    found = {
        "scores": d_rows @ writes.mT,
        "reads": d_rows @ before.mT,
        "handed_on": writes @ d_later.mT,
        "values": d_written,
    }
    if inside.kept is not None:
        of_kept = (before * d_later).sum(-1, keepdim=True)
        found["kept"] = of_kept if inside.kept.shape[-2] > 1 else of_kept.sum(-2, keepdim=True)
    if inverse is not None:
        found["values"] = d_values = inverse.mT @ d_written
        found["erases"] = (d_values @ before.mT).neg_()
        found["below"] = (d_values @ writes.mT).neg_()
    return found, d_after
