"""Softmax attention of one query whose heads all share many keys: every thread takes a part of the
keys, and the parts are joined by the logarithms of their sums, as Flash-Decoding does.

    A v = Σ_p w_p · rows_p,    w = softmax over the parts of log Σ_{l in p} exp(s_l)
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.softmax import shared_keys
from attnzoo.engines.softmax.reference import SoftmaxReference

ROWS = 32  # of a head and thread that torch's kernel takes at least
SHORTEST = 4096  # keys; below, parts are not worth joining
DTYPES = (torch.float32, torch.float64)


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (1, heads, 1, value_dim), of any call that `why_not` accepts."""
    parts, scale = torch.get_num_threads(), engine.scale_of(call.q)
    each = call.key_length // parts
    together, q = parts * each, call.q.transpose(1, 2)
    k, v = (x[:, 0, :together].unflatten(1, (parts, each)) for x in (call.k, call.v))
    # The sums of a part, (1, parts, heads), come with its rows from this operator alone.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, sums = kernel(q.expand(-1, parts, -1, -1), k, v, scale=scale)
    # Each of the few keys that are left is a part of its own.
    scores = (q @ call.k[:, :, together:].mT)[:, 0].mT * scale
    weights = torch.cat([sums, scores], 1).softmax(1)
    values = call.v[:, :, together:].transpose(1, 2).expand(-1, -1, q.shape[2], -1)
    return (weights[..., None] * torch.cat([rows, values], 1)).sum(1)[:, :, None]


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    given = (call.q, call.k, call.v)
    if not only_autograd_looks(*given):
        return "a graph or transform must see the operators inside"
    threads, heads = torch.get_num_threads(), call.q.shape[1]
    if call.q.shape[0] * call.query_length != 1 or -(-heads // ROWS) >= threads:
        return (
            "it spreads the keys of one query over threads that its heads leave idle, got "
            f"{call.q.shape[0]} samples of {call.query_length} queries and {heads} heads for "
            f"{threads} threads"
        )
    if call.key_length < SHORTEST:
        return f"it is for {SHORTEST} keys or more, got {call.key_length}"
    if call.key_mask is not None or call.attn_mask is not None or call.segments is not None:
        return "it has no masks"
    if call.q.dtype not in DTYPES or call.v.shape[3] != call.q.shape[3]:
        return (
            "it takes values as wide as keys, in float32 or float64, got "
            f"{call.v.shape[3]} beside {call.q.shape[3]} in {call.q.dtype}"
        )
    if engine.dropout > 0 and engine.training:
        return f"it has no dropout, and this attention trains with dropout={engine.dropout}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "it has no gradient"
    return shared_keys.why_not(engine, call)
