"""Softmax attention of a few queries whose heads all share one head of keys and values, as in
decoding with multi-query or latent attention: the heads of a query become the rows of one product,
so that keys and values are read once a query and not once for each of its heads."""

from __future__ import annotations

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import SoftmaxReference, additive, visible
from attnzoo.engines.softmax.sdpa import cannot as sdpa_cannot
from attnzoo.engines.softmax.sdpa import sdpa


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim), of any call that `why_not` accepts."""
    mask, bias = (_with_queries_first(x) for x in (visible(call), additive(call)))
    return sdpa(engine, call.q.transpose(1, 2), call.k, call.v, mask, bias).transpose(1, 2)


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    heads, kv_heads, queries = call.q.shape[1], call.k.shape[1], call.query_length
    if call.q.device.type != "cpu":
        return f"it is for the CPU, got tensors on {call.q.device.type}"
    if kv_heads != 1 or queries >= heads:
        return (
            "it is for fewer queries than heads, which all share one head of keys, got "
            f"{queries} queries of {heads} heads that share {kv_heads}"
        )
    for name in ("sink_logits", "distance_bias"):
        if name in call.inputs:
            return f"it has no place for {name}, which differs from head to head"
    return sdpa_cannot(engine, call)


def _with_queries_first(x: Tensor | None) -> Tensor | None:
    """(batch, heads, queries, keys), or what broadcasts to it, with the axes of heads and queries
    exchanged."""
    return None if x is None else x.reshape((1,) * (4 - x.dim()) + x.shape).transpose(1, 2)
