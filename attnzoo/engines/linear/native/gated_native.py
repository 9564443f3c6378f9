"""Backend `native` of gates and delta rules: what `chunked` does, by compiled operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.call import Call
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.gated.gated_chunks import scan
from attnzoo.engines.linear.gated.tokens import (
    REMOVAL_KEY,
    REMOVAL_RATE,
    Rule,
    empty_state,
    separated,
    told_what_to_remove,
)
from attnzoo.engines.linear.native.compiled_recurrence import Found, Recurrence, Tokens
from attnzoo.sequences.bad_slots import clear_padding
from attnzoo.spec import Input

Declared = tuple[Input, ...]


def attend(rule: Rule, call: Call) -> Tensor:
    """A·v of a call with as many queries as keys."""
    return carried(rule, separated(rule, call), None)[0]


def carried(rule: Rule, call: Call, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows in q's dtype, and the state behind them.

    call: without segments, with as many queries as keys
    state: before the call, (batch, kv_heads, width, value_dim) in the dtype of sums; None: all 0
    """
    given = (call.q, call.k, call.v, *call.inputs.values())
    dtype = accumulation_dtype(call.q.dtype)
    if any(x.dtype != dtype for x in given):
        q, k, v, *others = (x.to(dtype) for x in given)
        made = replace(call, q=q, k=k, v=v, inputs=dict(zip(call.inputs, others, strict=True)))
        rows, after = carried(rule, made, state)
        return rows.to(call.q.dtype), after
    call = told_what_to_remove(rule, call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, state)):
        named = dict(call.given())
        tensors = (call.q, call.k, call.v, *named.values())
        with without_autocast(call.q.device):
            return _Carried.apply(rule, tuple(named), call.key_mask, state, *tensors)  # pyright: ignore[reportReturnType]
    found = _operation(rule, call.q).forward(_tokens(rule, call), state, remember=False)
    return found.rows, found.after


def _call_of(
    declared: Declared, key_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *given: Tensor
) -> Call:
    inputs = {one.name: x for one, x in zip(declared, given, strict=True)}
    return Call(q, k, v, key_mask, is_causal=True, inputs=inputs, declared=declared)


def _operation(rule: Rule, q: Tensor) -> Recurrence:
    scale = int(q.shape[-1]) ** -0.5 if rule.scale is None else rule.scale
    return Recurrence(scale, rule.delta, rule.l2_norm)


def _tokens(rule: Rule, call: Call) -> Tokens:
    removed, rate = call.get(REMOVAL_KEY.name), call.get(REMOVAL_RATE.name)
    turned = None if removed is None or rate is None else removed * rate
    beta = call.get("beta") if rule.delta else None
    gates = (call.get("log_decay"), beta, removed, turned)
    return Tokens(call.q, call.k, call.v, *gates, call.key_mask)


def _in_open_operators(
    rule: Rule,
    declared: Declared,
    key_mask: Tensor | None,
    state: Tensor | None,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor]:
    call = clear_padding(_call_of(declared, key_mask, *tensors))
    pieces = list(scan(rule, call, state, remember_last=True))
    after = pieces[-1][1]
    assert after is not None
    return torch.cat([rows for rows, _ in pieces], 2), after


class _Carried(torch.autograd.Function):
    """`carried`, of tensors in the dtype of sums, and its gradients by the compiled way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        declared: Declared,
        key_mask: Tensor | None,
        state: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        call = _call_of(declared, key_mask, *tensors)
        remember = any(ctx.needs_input_grad)
        found = _operation(rule, call.q).forward(_tokens(rule, call), state, remember=remember)
        if remember:
            # Not the rows, which nothing divided: a caller may write over them.
            ctx.save_for_backward(key_mask, state, *tensors, found.divisors, found.states)
            ctx.rule, ctx.declared = rule, declared
            ctx.set_materialize_grads(False)
        return found.rows, found.after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        key_mask, state, *saved = ctx.saved_tensors
        tensors, (divisors, states) = saved[:-2], saved[-2:]
        call = _call_of(ctx.declared, key_mask, *tensors)
        sent, d_after = gradients
        if sent is None:
            sent = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
        if is_followed(sent):
            rule, declared = ctx.rule, ctx.declared
            after = empty_state(call) if d_after is None else d_after
            found = open_gradients(
                lambda *given: _in_open_operators(rule, declared, key_mask, *given),
                (state, *tensors),
                (sent, after),
            )
            return None, None, None, *found
        tokens = _tokens(ctx.rule, call)
        found = Found(divisors, divisors, states, states)
        made, d_state = _operation(ctx.rule, call.q).backward(tokens, found, sent, d_after)
        by_name = {"log_decay": made.log_decay, "beta": made.beta}
        if made.removed is not None and made.turned is not None:
            by_name[REMOVAL_KEY.name] = made.turned.mul(call.inputs[REMOVAL_RATE.name]).add_(
                made.removed
            )
            by_name[REMOVAL_RATE.name] = made.turned * call.inputs[REMOVAL_KEY.name]
        given = [by_name[one.name] for one in ctx.declared]
        d_state = None if state is None else d_state
        return None, None, None, d_state, made.q, made.k, made.v, *given
