"""Backend `native_row`: one query of every head, as decoding brings it, by a compiled operator that
reads the keys that are seen and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import Backend
from attnzoo.engines.native import library
from attnzoo.engines.native.library import cannot_compile, in_rows, operators
from attnzoo.engines.softmax.decay_bias import LOG_DECAY
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, KEY_POSITIONS
from attnzoo.engines.softmax.reference import SINK_LOGITS, SoftmaxReference
from attnzoo.engines.softmax.tiles import tiles


def attend(
    engine: SoftmaxReference,
    call: Call,
    *,
    shown: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: int = 1,
    subtracted: Tensor | None = None,
    is_sigmoid: bool = False,
    row_bias: float | None = None,
) -> Tensor:
    """A·v, (batch, heads, 1, value_dim), of a call that `why_not` accepts.

    shown: (batch, heads, keys) bool, the keys that are seen beside what the call's key_mask says
    blocks: (batch or 1, choosers, width) int64, the blocks of keys that are seen, each once, and -1
        where there are fewer; consecutive heads share a chooser. None: all keys are seen
    block_size: keys of a block
    subtracted: (batch or 1, heads or 1), how much of a second map is taken off the first; each has
        a half of the queries and keys. None: there is one map
    is_sigmoid: whether a score is weighed by itself, with `row_bias`; None: -log of the keys seen
    """
    q, k, v = (in_rows(x) for x in (call.q, call.k, call.v))
    mask, logits = call.key_mask, call.get(SINK_LOGITS.name)
    if shown is not None:
        mask = shown if mask is None else shown & mask[:, None]
    log_decay = call.get(LOG_DECAY.name)
    return operators().native_row(
        q,
        k,
        v,
        None if mask is None else in_rows(mask),
        _bias_of_keys(call),
        None if log_decay is None else in_rows(log_decay.to(q.dtype)),
        blocks,
        block_size,
        None if logits is None else logits.to(q.dtype).contiguous(),
        subtracted,
        engine.scale_of(q),
        is_sigmoid,
        row_bias,
    )


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why the compiled operator refuses the call; None when it takes it."""
    if call.query_length != 1:
        return f"it is for one query, got {call.query_length}"
    if call.q.dtype not in tiles.DTYPES:
        return f"sums of {call.q.dtype} run in float32, and a compiled row has one dtype"
    if engine.softcap is not None:
        return "it has no softcap"
    if call.attn_mask is not None:
        return "it has no attn_mask"
    if KEY_POSITIONS.name in call.inputs:
        return "it has no distance_bias of keys that stand apart"
    if torch.is_grad_enabled() and _is_learned(engine, call):
        return "it has no gradient"
    return tiles.cannot_work_alone(engine, call) or cannot_compile()


def backend(
    run: Callable[[Any, Call], Tensor] = attend,
    why_not: Callable[[Any, Call], str | None] = why_not,
) -> Backend:
    """The backend of an engine, by `attend` or what calls it. why_not: asks the one of this file,
    too."""
    return Backend("native_row", run, why_not, untried=_passed_over)


def _passed_over(engine: SoftmaxReference, call: Call) -> str | None:
    return library.not_compiled()


def _is_learned(engine: SoftmaxReference, call: Call) -> bool:
    given = (call.q, call.k, call.v, *call.inputs.values(), *engine.parameters())
    return any(x.requires_grad for x in given)


def _bias_of_keys(call: Call) -> Tensor | None:
    """What the distance of every key adds to its score, (1, heads, keys)."""
    bias, length = call.get(DISTANCE_BIAS.name), call.key_length
    if bias is None:
        return None
    first = bias.shape[1] // 2 - length + 1
    return in_rows(bias.to(call.q.dtype).narrow(1, first, length)[None])
