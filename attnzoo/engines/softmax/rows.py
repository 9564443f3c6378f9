"""Softmax attention a few rows at a time, for what SDPA cannot be asked: scores with a softcap, and
a bias that is more precise than q."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.piece_by_piece import at_a_time, join
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, moved_on
from attnzoo.engines.softmax.reference import (
    SoftmaxReference,
    additive,
    masked_softmax,
    visible,
)
from attnzoo.engines.softmax.sdpa import fills_up, sdpa

SCORES = 2**22  # numbers of a few rows that are held at a time


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim), of a call that `why_not` accepts. Only with
    gradients are all scores held, by autograd."""
    rows = (
        attend_rows(
            engine, part.q, part.k, part.v, visible(part), part.get("sink_logits"), additive(part)
        )
        for part in parts(call)
    )
    return join(rows, call.query_length, 2)


def parts(call: Call) -> Iterator[Call]:
    """The calls of a few rows at a time."""
    length = int(call.query_length)
    scores_of_a_row = call.q.shape[0] * call.q.shape[1] * int(call.key_length)
    together = at_a_time(length, scores_of_a_row, SCORES, call.q)
    if together >= length:
        yield call
        return
    for first in range(0, length, together):
        yield _part(call, first, min(first + together, length))


def _part(call: Call, first: int, end: int) -> Call:
    """The call of some rows, whose last query stands at its last key where that matters."""
    if call.is_causal and call.offset >= 0:
        return call.select(queries=slice(first, end), keys=slice(0, call.offset + end))
    later = call.query_length - end
    part = call.select(queries=slice(first, end))
    bias = call.get(DISTANCE_BIAS.name)
    return part if bias is None else part.giving(DISTANCE_BIAS, moved_on(bias, later))


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    if call.is_causal and call.offset < 0:
        return (
            f"query_length={call.query_length} is over key_length={call.key_length} in a causal "
            "call: the first rows see nothing"
        )
    return None


def attend_rows(
    engine: SoftmaxReference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    bias: Tensor | None = None,
    *,
    every_row_sees: bool = False,
) -> Tensor:
    """As `sdpa`, also with sink logits, a softcap, and a bias of another dtype; with these, the
    scores are formed whole, and autograd keeps them.

    q: (batch, heads, rows, head_dim)
    k, v: (batch, kv_heads, keys, head_dim or value_dim)
    mask: bool, True = attend, broadcastable to (batch, heads, rows, keys)
    sink_logits: broadcastable to (batch, heads, rows, 1), or (heads,); None: there are none
    bias: float, added to the scores, broadcastable as mask
    every_row_sees: the caller knows that no row of `mask` is empty

    Returns (batch, heads, rows, value_dim).
    """
    takes_bias = bias is None or bias.dtype == q.dtype
    if sink_logits is None and engine.softcap is None and takes_bias and not fills_up(q, k, v):
        return sdpa(engine, q, k, v, mask, bias, every_row_sees=every_row_sees)
    if sink_logits is not None and sink_logits.dim() == 1:
        sink_logits = sink_logits[:, None, None]
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    k, v = (repeat_heads(x, group).to(dtype) for x in (k, v))
    scores = engine.capped((q.to(dtype) @ k.mT) * engine.scale_of(q))
    if bias is not None:
        scores = scores + bias.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    plain = mask is None and bias is None and sink_logits is None
    attention = scores.softmax(-1) if plain else masked_softmax(scores, sink_logits)
    if engine.dropout and engine.training:
        attention = F.dropout(attention, engine.dropout)
    return (attention @ v).to(q.dtype)
