"""Softmax attention a few rows at a time, for what SDPA cannot be asked: scores with a softcap, and
a bias that is more precise than q."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.piece_by_piece import at_a_time, join
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, moved_on
from attnzoo.engines.softmax.reference import SoftmaxReference, additive, visible
from attnzoo.engines.softmax.sdpa import attend_rows

SCORES = 2**22  # numbers of a few rows that are held at a time


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim), of a call that `why_not` accepts. Only with
    gradients are all scores held, by autograd."""
    rows = (
        attend_rows(
            engine, part.q, part.k, part.v, _mask(part), part.get("sink_logits"), additive(part)
        )
        for part in parts(call)
    )
    return join(rows, call.query_length, 2)


def _mask(call: Call) -> Tensor | None:
    """Which keys are seen; None where all are, as by the one query that stands at the last key."""
    plain = call.key_mask is None and call.attn_mask is None and call.segments is None
    return None if plain and call.query_length == 1 else visible(call)


def parts(call: Call) -> Iterator[Call]:
    """The calls of a few rows at a time."""
    length = int(call.query_length)
    scores_of_a_row = call.q.shape[0] * call.q.shape[1] * int(call.key_length)
    together = at_a_time(length, scores_of_a_row, SCORES, call.q)
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
