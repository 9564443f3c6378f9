"""Gates and delta rules by flash-linear-attention's chunked kernels (CUDA, optional).

Each rule has a kernel there. What differs is how a call is spelled: tokens come before heads, every
query head has keys, values and gates of its own, a factor of the rows is always given, and what
RWKV-7 removes is told as two vectors whose product is added. Logarithms are natural there too, and
q and k are brought to length 1 with the same epsilon inside the root.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.installed import missing
from attnzoo.engines.linear.gated.reference import GatedReference
from attnzoo.engines.linear.gated.tokens import Rule, prepared

#: The least log_decay that is handed over: in a closed gate, -inf, sums of gates would be no
#: numbers, and of what e^-80 leaves, float32 keeps nothing beside anything else.
CLOSED = -80.0
WIDEST = 256  # channels of a head, of a kernel that erases


def kernel_of(rule: Rule) -> tuple[str, str]:
    """The module of fla.ops and the function in it that computes a rule."""
    if rule.removes:
        return "generalized_delta_rule", "chunk_dplr_delta_rule"
    if rule.delta and rule.by_channel:
        return "kda", "chunk_kda"
    if rule.delta:
        gated = rule.gate is not None
        return (
            ("gated_delta_rule", "chunk_gated_delta_rule")
            if gated
            else ("delta_rule", "chunk_delta_rule")
        )
    return ("gla", "chunk_gla") if rule.by_channel else ("simple_gla", "chunk_simple_gla")


def run(engine: GatedReference, call: Call) -> Tensor:
    """A·v by flash-linear-attention's own kernel."""
    module, name = kernel_of(engine.rule)
    return attend(engine.rule, call, getattr(import_module(f"fla.ops.{module}"), name))


def attend(rule: Rule, call: Call, kernel: Callable[..., Any]) -> Tensor:
    """A·v by a kernel of the rule.

    call: with as many queries as keys
    kernel: what `kernel_of` names, or any function of its signature

    Returns (batch, heads, length, value_dim), in q's dtype.
    """
    out, _ = kernel(**arguments(rule, call))
    return out.transpose(1, 2).to(call.q.dtype)


def arguments(rule: Rule, call: Call) -> dict[str, Any]:
    """What the kernel of a rule is told of a call."""

    def told(x: Tensor) -> Tensor:
        """(batch, kv_heads, length, ...) -> (batch, length, heads, ...)"""
        return repeat_heads(x, call.group).transpose(1, 2)

    ready = prepared(rule, call)
    given: dict[str, Any] = {"q": call.q.transpose(1, 2), "k": told(call.k), "v": told(call.v)}
    given["scale"] = int(call.q.shape[3]) ** -0.5 if rule.scale is None else rule.scale
    if rule.gate is not None:
        name = "gk" if rule.removes else "g"
        given[name] = told(ready.inputs["log_decay"].clamp(min=CLOSED))
    if rule.removes:
        removed, rates = (ready.inputs[name] for name in ("removal_key", "removal_rate"))
        given["a"], given["b"] = (told(x.to(call.q.dtype)) for x in (-removed, removed * rates))
    if rule.delta:
        beta = ready.get("beta")
        given["beta"] = told(torch.ones_like(ready.k[..., 0]) if beta is None else beta)
        given["use_qk_l2norm_in_kernel"] = rule.l2_norm
    return given


def why_not(engine: GatedReference, call: Call) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it."""
    rule = engine.rule
    if call.q.device.type != "cuda":
        return f"flash-linear-attention needs tensors on a CUDA device, got {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return (
            f"flash-linear-attention multiplies in TF32 at best, too coarse for {call.q.dtype}: "
            "use float16 or bfloat16"
        )
    if call.query_length != call.key_length:
        return (
            f"flash-linear-attention needs query_length == key_length, got {call.query_length} and "
            f"{call.key_length}"
        )
    if (rule.delta or rule.removes) and call.q.shape[3] > WIDEST:
        return (
            f"flash-linear-attention erases at most {WIDEST} channels, got head_dim="
            f"{call.q.shape[3]}"
        )
    if not only_autograd_looks(call.q, call.k, call.v, *call.inputs.values()):
        return "flash-linear-attention breaks graphs, and no transform sees inside"
    return missing("fla", "pip install 'attnzoo[cuda]'")
