"""Causal linear attention by flash-linear-attention's fused chunks (CUDA, optional).

Its gated operator computes what the backend `chunked` does. Let m_i be the largest log_scale up to
token i (see feature_maps.py for log_scale). A key j enters the state with the weight
exp(log_scale_j - m_j), and the gate exp(m_{i-1} - m_i) carries the state from one token to the
next, so that row i weighs key j by exp(log_scale_j - m_i). A column of ones beside v gives the
normaliser in the same pass; the library's own normaliser adds an epsilon and sums keys in the
input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.installed import missing
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.reference import LinearReference


def run(engine: LinearReference, call: Call) -> Tensor:
    """A·v by flash-linear-attention's own kernel."""
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return attend(engine.feature_map, call, chunk_simple_gla)


def attend(feature_map: FeatureMap, call: Call, gated: Callable[..., Any]) -> Tensor:
    """A·v by a gated linear attention operator.

    Features, values and the sums of both stay in float32, which the kernels multiply in TF32: fp16
    would overflow in the normaliser, and bf16 would round numerator and normaliser differently.

    feature_map: the φ of queries and keys
    call: causal, with as many queries as keys
    gated: fla's chunk_simple_gla, or any function of its signature

    Returns (batch, heads, length, value_dim), in q's dtype.
    """
    q_features = feature_map.query(call.q.float())
    k_features, log_scale = feature_map.key(call.k.float())
    v = call.v.float()
    gate = None
    if log_scale is not None:
        k_features, gate = _gated(k_features, log_scale, call.key_mask)
    elif call.key_mask is not None:
        k_features = k_features.masked_fill(~call.key_mask[:, None, :, None], 0.0)
    if feature_map.normalizer == "row":
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    k_features, v = repeat_heads(k_features, call.group), repeat_heads(v, call.group)
    gate = None if gate is None else repeat_heads(gate, call.group).transpose(1, 2)
    out, _ = gated(*(x.transpose(1, 2) for x in (q_features, k_features, v)), g=gate, scale=1.0)
    out = out.transpose(1, 2)
    if feature_map.normalizer == "row":
        total = out[..., -1:]
        # A row with nothing to see, or whose sum is only what underflow left of it.
        empty = total.abs() < torch.finfo(total.dtype).tiny ** 0.8
        out = (out[..., :-1] / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return out.to(call.q.dtype)


def _gated(k_features: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Key features weighed relative to the running maximum of log_scale, and the logarithm of the
    gate that each token puts on the state before it.

    k_features: (batch, kv_heads, length, width)
    log_scale: (batch, kv_heads, length)
    key_mask: (batch, length) bool, False in padded slots; None: no padding
    """
    if key_mask is not None:
        log_scale = log_scale.masked_fill(~key_mask[:, None, :], float("-inf"))
    running = log_scale.detach().cummax(-1).values
    gate = torch.zeros_like(running)
    # Where the maximum before is -inf no key came yet, and there is no state to shrink.
    gate[..., 1:] = (running[..., :-1] - running[..., 1:]).masked_fill(
        running[..., :-1] == float("-inf"), 0.0
    )
    weights = (log_scale - running.clamp(min=torch.finfo(running.dtype).min)).exp()
    return k_features * weights[..., None], gate


def why_not(engine: LinearReference, call: Call) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it."""
    if call.q.device.type != "cuda":
        return f"flash-linear-attention needs tensors on a CUDA device, got {call.q.device.type}"
    if engine.feature_map.decay.fades:
        return "a decay of keys is not passed on to flash-linear-attention"
    if engine.feature_map.normalizer == "feature":
        return "flash-linear-attention has no map that is normalised along the length"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return (
            f"flash-linear-attention multiplies in TF32 at best, too coarse for {call.q.dtype}: "
            "use float16 or bfloat16"
        )
    if not call.is_causal:
        return "flash-linear-attention is causal only; without is_causal two matrix products do it"
    if call.query_length != call.key_length:
        return (
            f"flash-linear-attention needs query_length == key_length, got {call.query_length} and "
            f"{call.key_length}"
        )
    if not only_autograd_looks(call.q, call.k, call.v):
        return "flash-linear-attention breaks graphs, and no transform sees inside"
    return missing("fla", "pip install 'attnzoo[cuda]'")
