"""Log-linear attention over Mamba-2 by flash-linear-attention's kernel (CUDA, optional), which
never ran here.

A call is spelled otherwise there: tokens come before heads, and levels after them; keys belong to
query heads; the factor of the rows is given.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.linear.gated import fla_kernels
from attnzoo.engines.linear.gated.reference import GatedReference
from attnzoo.engines.linear.gated.tokens import Rule, prepared
from attnzoo.engines.linear.log_linear.tree import given_levels

KEY_BLOCK = 64  # the kernel takes keys whose width is a multiple of it


def run(engine: GatedReference, call: Call) -> Tensor:
    """A·v by flash-linear-attention's own kernel."""
    module = import_module("fla.ops.log_linear_attn")
    return attend(engine.rule, call, module.chunk_log_linear_attn)


def attend(rule: Rule, call: Call, kernel: Callable[..., Any]) -> Tensor:
    """A·v by a kernel of the signature of `chunk_log_linear_attn`.

    call: with as many queries as keys

    Returns (batch, heads, length, value_dim), in q's dtype.
    """
    out, _ = kernel(**arguments(rule, call))
    return out.transpose(1, 2).to(call.q.dtype)


def arguments(rule: Rule, call: Call) -> dict[str, Any]:
    """What the kernel is told of a call."""

    def told(x: Tensor) -> Tensor:
        """(batch, kv_heads, length, ...) -> (batch, length, heads, ...)"""
        return repeat_heads(x, call.group).transpose(1, 2)

    gate = prepared(rule, call).get("log_decay")
    gate = call.k.new_zeros(call.k.shape[:3]) if gate is None else gate
    levels = given_levels(call, call.key_length)
    return {
        "q": call.q.transpose(1, 2),
        "k": told(call.k),
        "v": told(call.v),
        "g": told(gate.clamp(min=fla_kernels.CLOSED)),
        "level_scales": levels.transpose(1, 2),
        "scale": int(call.q.shape[3]) ** -0.5 if rule.scale is None else rule.scale,
    }


def why_not(engine: GatedReference, call: Call) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it."""
    if (reason := fla_kernels.why_not(engine, call)) is not None:
        return reason
    if engine.rule.delta:
        return "flash-linear-attention has a tree of Mamba-2's states, and none of delta rules"
    if call.key_mask is not None:
        return "its places count every slot, and here real tokens alone count"
    if call.k.shape[3] % KEY_BLOCK:
        return f"its keys are a multiple of {KEY_BLOCK} wide, got head_dim={call.k.shape[3]}"
    if call.v.shape[3] & (call.v.shape[3] - 1):
        return f"its values are a power of 2 wide, got value_dim={call.v.shape[3]}"
    return None
