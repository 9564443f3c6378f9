"""Rows of PaTH attention, a chunk of tokens at a time, without a tensor of n² numbers.

The queries of a chunk are turned to before it, and then through one earlier chunk after the other;
at each they meet its keys, turned to behind it. Where autograd records, all is computed again in
the backward pass: kept are the inputs, and what `Chunks` makes of them, which with heads of 64 is
twice as many numbers as q and twice as many as k have.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.differentiable import recomputed
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.gated.tokens import REMOVAL_KEY, STRENGTH
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.softmax.decay_bias import LOG_DECAY, summed
from attnzoo.engines.softmax.reference import SoftmaxReference, masked_softmax
from attnzoo.variants.path.householder import Chunks


def attend(engine: SoftmaxReference, call: Call, turned: Tensor | None = None) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype.

    call: causal, with all three inputs or none of w and β
    turned: the first keys, turned to behind the last of them, (batch, kv_heads, first, width); the
        queries are of later tokens. None: all keys are as the call has them
    """
    if call.offset < 0:  # the first queries stand before every key
        seeing = attend(engine, call.select(queries=slice(-call.offset, None)), turned)
        return F.pad(seeing, (0, 0, -call.offset, 0))
    rows = join(_rows(engine, call, turned), call.query_length, 2)
    return rows.to(call.q.dtype)


def _rows(engine: SoftmaxReference, call: Call, turned: Tensor | None) -> Iterator[Tensor]:
    dtype, first = accumulation_dtype(call.q.dtype), 0 if turned is None else turned.shape[2]
    q, k, v = (x.to(dtype) for x in (call.q, call.k[:, :, first:], call.v))
    w, beta = (call.get(one.name) for one in (REMOVAL_KEY, STRENGTH))
    w = torch.zeros_like(k) if w is None else w[:, :, first:].to(dtype)
    beta = torch.zeros_like(k[..., 0]) if beta is None else beta[:, :, first:].to(dtype)
    ahead = k.shape[2] - q.shape[2]
    q = F.pad(q * engine.scale_of(q), (0, 0, ahead, 0))
    again = torch.is_grad_enabled() and only_autograd_looks(call.q, call.k, call.v)
    compute = partial(Chunks.of, begins=turned is None)
    chunks = Chunks(*(recomputed(compute, q, k, w, beta) if again else compute(q, k, w, beta)))
    given: tuple[Any, ...] = (v, call.get(LOG_DECAY.name), turned, *chunks)
    masks, size = (call.key_mask, call.segments), chunks.products.shape[-1]
    for place in range(ahead // size, chunks.products.shape[3]):
        of_chunk = partial(_of_chunk, place, *masks)
        rows = recomputed(of_chunk, *given) if again else of_chunk(*given)
        start, end = place * size, min((place + 1) * size, k.shape[2])
        yield rows[:, :, max(0, ahead - start) : end - start]


def _of_chunk(
    place: int,
    key_mask: Tensor | None,
    segments: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    turned: Tensor | None,
    *of_chunks: Tensor,
) -> Tensor:
    """The rows of one chunk, (batch, heads, length, value_dim), those of its filling included.

    place: its number
    key_mask, segments, v, log_decay: of all keys
    turned: as `attend` takes it
    of_chunks: the tensors of `Chunks`
    """
    chunks, first = Chunks(*of_chunks), int(turned is None)
    causal = chunks.products.new_ones(*chunks.products.shape[-2:], dtype=torch.bool).tril()
    local = chunks.products[:, :, :, place].masked_fill(~causal, float("-inf"))
    states = [chunks.queries[:, :, :, place - first]] if place >= first else []
    for chunk in reversed(range(first, place)):  # the nearest first
        states.append(states[-1] @ chunks.turns[:, :, None, chunk - first])
    parts = [] if turned is None else [states.pop() @ turned[:, :, None].mT]
    if place:
        met = torch.stack(states[::-1], 3)  # (batch, kv_heads, group, chunks, length, width)
        found = met @ chunks.keys[:, :, None, :place].mT
        parts.append(found.movedim(3, 4).flatten(4))
    scores = torch.cat([*parts, local], -1).flatten(1, 2)
    rows, keys = scores.shape[-2:]
    filling = max(0, keys - v.shape[2])
    if log_decay is not None:
        scores = _faded(scores, F.pad(log_decay[..., :keys], (0, filling)))
    if key_mask is None and segments is None:  # a row sees its own key at least
        weights = scores.softmax(-1)
    else:
        mask = scores.new_ones(1, 1, 1, keys, dtype=torch.bool)
        if key_mask is not None:
            mask = F.pad(key_mask[:, :keys], (0, filling))[:, None, None]
        if segments is not None:
            ids = F.pad(segments[:, :keys], (0, filling))
            mask = mask & (ids[:, None, -rows:, None] == ids[:, None, None])
        weights = masked_softmax(scores.masked_fill(~mask, float("-inf")))
    weights = weights.unflatten(1, (v.shape[1], -1)).flatten(2, 3)
    found = weights @ F.pad(v[:, :, :keys], (0, 0, 0, filling))
    return found.unflatten(2, (-1, rows)).flatten(1, 2)


def _faded(scores: Tensor, log_decay: Tensor) -> Tensor:
    """Scores with what gates behind their keys take, or all that stands before a closed gate.
    log_decay: (batch, heads, keys)"""
    sums, closings = summed(log_decay)
    rows = slice(scores.shape[-1] - scores.shape[-2], None)
    bias = (sums[..., rows, None] - sums[..., None, :]).to(scores.dtype)
    apart = closings[..., rows, None] > closings[..., None, :]
    return (scores + bias).masked_fill(apart, float("-inf"))


def whole(call: Call) -> Call:
    """The call with a β of 1 for every w that it has none for."""
    if REMOVAL_KEY.name not in call.inputs:
        if STRENGTH.name in call.inputs:
            raise ValueError(
                "beta says how much of removal_key is taken, and there is none: give both, or "
                "removal_key alone"
            )
        return call
    if STRENGTH.name in call.inputs:
        return call
    return call.giving(STRENGTH, torch.ones_like(call.k[..., 0]))
