"""Softmax attention on the CPU, a few rows at a time.

Products and softmax are written to memory that is used again for the next rows, so that it stays in
the processor's cache. The backward pass computes the weights again, so that autograd keeps q, k and
v alone: computing what fits a cache is faster than fetching it from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.differentiable import Compute, is_followed, open_gradients
from attnzoo.engines.softmax.decay_bias import CLOSED, summed
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, reaching
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles.tile_pieces import (
    InPieces,
    Memory,
    Piece,
    Pieces,
    Way,
    cap,
    parts_at_a_time,
)

DTYPES = (torch.float32, torch.float64)  # in lower ones, sums would need a higher precision


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why tiles refuse the call, whatever keys its pattern shows; None when they take it."""
    if call.q.dtype not in DTYPES:
        return f"sums of {call.q.dtype} run in float32, and tiles have one dtype"
    bias = call.get(DISTANCE_BIAS.name)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "a learned distance_bias gets no gradient from tiles"
    return cannot_work_alone(engine, call)


def cannot_work_alone(engine: SoftmaxReference, call: Call) -> str | None:
    """Why an autograd.Function of this library may not compute the call; None when it may.

    It may on a CPU, without dropout, and where neither a recorded graph nor a torch.func transform
    must see the operators inside.
    """
    if call.q.device.type != "cpu":
        return f"it is for the CPU, got tensors on {call.q.device.type}"
    if engine.dropout > 0 and engine.training:
        return f"it has no dropout, and this attention trains with dropout={engine.dropout}"
    if not only_autograd_looks(call.q, call.k, call.v, *call.inputs.values()):
        return "a graph or transform must see the operators inside"
    return None


def attend(engine: SoftmaxReference, call: InPieces) -> Tensor:
    """A·v of a call in pieces, as `Way.attend`."""
    q, bias, logits = call.q, call.bias, call.sink_logits
    if bias is not None:  # pieces also have keys that none of their rows sees
        bias = reaching(bias.detach().to(q.dtype), q.shape[2] + call.k.shape[2])
    logits = None if logits is None else logits.to(q.dtype)
    key_cap = None if call.key_mask is None else cap(call.key_mask, q)
    added = (logits, bias, call.log_decay, call.row_bias)
    tensors = (q, call.k, call.v, key_cap, call.table, *added)
    return _Attend.apply(*tensors, call.pieces, engine, call.compute)


IN_CACHE = Way(attend, parts_at_a_time)


class _Attend(torch.autograd.Function):
    """`attend`, and its gradients from weights that are computed again piece by piece."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cap: Tensor | None,
        table: Tensor | None,
        sink_logits: Tensor | None,
        bias: Tensor | None,
        log_decay: Tensor | None,
        row_bias: Tensor | None,
        pieces: Pieces,
        engine: SoftmaxReference,
        compute: Compute,
    ) -> Tensor:
        out, memory = q.new_empty(*q.shape[:3], v.shape[3]), Memory(q)
        sums = None if log_decay is None else summed(log_decay)[0]
        weigh = partial(_weights, engine, memory, _some_are_empty(q, k, key_cap, bias))
        for one, kv, found in _heads(q, k, pieces(q, table)):
            queries, keys, values, result = q[one], k[kv], v[kv], out[one]
            of_head = _of_head(one, key_cap, sink_logits, bias, sums, row_bias)
            for piece in found:
                rows = piece.rows(result)
                if not piece.shape[2]:
                    rows.zero_()
                    continue
                its_keys = piece.keys(keys, "fetched", memory)
                weights, _ = weigh(piece, piece.rows(queries), its_keys, *of_head)
                torch.bmm(weights, piece.keys(values, "fetched", memory), out=rows)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.pieces, ctx.engine, ctx.compute = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_cap, table, sink_logits, bias, log_decay, row_bias = ctx.saved_tensors
        if is_followed(gradients[0]):
            given = (q, k, v, sink_logits, *([] if log_decay is None else [log_decay]))
            *to_qkv, to_logits, to_decay = (
                *open_gradients(ctx.compute, given, gradients[0]),
                *([None] if log_decay is None else []),
            )
            return *to_qkv, None, None, to_logits, None, to_decay, *[None] * 4
        engine = ctx.engine
        scale, cap = engine.scale_of(q), engine.softcap
        gradient, memory = gradients[0].contiguous(), Memory(q)
        dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        to_logits = None if sink_logits is None else torch.zeros_like(sink_logits)
        sums = None if log_decay is None else summed(log_decay)[0]
        from_sums = None if sums is None else torch.zeros_like(sums)
        weigh = partial(_weights, engine, memory, _some_are_empty(q, k, key_cap, bias))
        for one, kv, found in _heads(q, k, ctx.pieces(q, table)):
            queries, keys, values, sent, to_queries, to_keys, to_values = (
                q[one],
                k[kv],
                v[kv],
                gradient[one],
                dq[one],
                dk[kv],
                dv[kv],
            )
            of_head = _of_head(one, key_cap, sink_logits, bias, sums, row_bias)
            for piece in found:
                to_rows = piece.rows(to_queries)
                parts, _, count = piece.shape
                if not count:
                    to_rows.zero_()
                    continue
                rows, sent_rows, slopes = (
                    piece.rows(queries),
                    piece.rows(sent),
                    memory("slopes", *piece.shape),
                )
                torch.bmm(sent_rows, piece.keys(values, "fetched", memory).mT, out=slopes)
                # The keys overwrite the values in memory, which are not needed any more.
                its_keys = piece.keys(keys, "fetched", memory)
                weights, capped = weigh(piece, rows, its_keys, *of_head, keep=cap is not None)
                part = torch.bmm(
                    weights.mT, sent_rows, out=memory("gradient", parts, count, v.shape[3])
                )
                piece.add(part, to_values)
                engine.through_weights_(slopes, weights)
                if to_logits is not None:
                    # The slopes of a row and of its logit sum to 0: one number added to all of its
                    # scores changes nothing.
                    to_logits[one[1]] -= slopes.sum()
                if from_sums is not None:
                    piece.add(slopes.sum(-2)[..., None], from_sums[one][:, None])
                if capped is not None and cap is not None:
                    slopes.addcmul_(slopes, capped.div_(cap).square_(), value=-1)
                torch.baddbmm(to_rows, slopes, its_keys, beta=0, alpha=scale, out=to_rows)
                part = memory("gradient", parts, count, k.shape[3])
                torch.baddbmm(part, slopes.mT, rows, beta=0, alpha=scale, out=part)
                piece.add(part, to_keys)
        to_decay = None
        if log_decay is not None and from_sums is not None:
            # A sum is taken off the scores of its key, and added to those of its row, whose slopes
            # sum to 0; a gate that is closed stays closed.
            to_decay = from_sums.neg_().flip(-1).cumsum(-1).flip(-1)
            to_decay = to_decay.masked_fill_(log_decay <= CLOSED, 0.0).to(log_decay.dtype)
        return dq, dk, dv, None, None, to_logits, None, to_decay, *[None] * 4


def _heads(
    q: Tensor, k: Tensor, pieces: Sequence[Sequence[Piece]]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Sequence[Piece]]]:
    """The indices (sample, head) and (sample, kv_head) and the pieces of every head.

    pieces: of every head, or of every sample and head, the heads of a sample together
    """
    group = q.shape[1] // k.shape[1]
    for sample in range(q.shape[0]):
        for head in range(q.shape[1]):
            yield (
                (sample, head),
                (sample, head // group),
                pieces[(sample * q.shape[1] + head) % len(pieces)],
            )


def _of_head(
    one: tuple[int, int],
    key_cap: Tensor | None,
    sink_logits: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    row_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The cap of the sample's keys, the head's sink logit, what its bias is made of, a table of
    distances or the sums of its gates, and the bias of the sample's rows."""
    sample, head = one
    of_keys, of_rows = (
        None if x is None else x[sample if x.shape[0] > 1 else 0] for x in (key_cap, row_bias)
    )
    logit, of_distances = (None if x is None else x[head] for x in (sink_logits, bias))
    return of_keys, logit, of_distances if sums is None else sums[one], of_rows


def _some_are_empty(q: Tensor, k: Tensor, key_cap: Tensor | None, bias: Tensor | None) -> bool:
    """Whether there may be rows that see no key."""
    hides = bias is not None and bool((bias == -torch.inf).any())
    return key_cap is not None or q.shape[2] > k.shape[2] or hides


def _weights(
    engine: SoftmaxReference,
    memory: Memory,
    some_are_empty: bool,
    piece: Piece,
    q: Tensor,
    k: Tensor,
    key_cap: Tensor | None,
    sink_logit: Tensor | None,
    bias: Tensor | None,
    row_bias: Tensor | None,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores of a piece, (parts, rows, keys), in the memory named "scores"; and the
    scores within the softcap, in the memory named "capped", if they are to be kept.

    engine: gives the scale and the softcap
    memory: where results are written
    some_are_empty: whether there may be rows that see no key, which must become 0
    piece: its shape, the caps that hide some keys, and how far its keys stand from its rows
    q: (parts, rows, head_dim)
    k: (parts, keys, head_dim)
    key_cap: (key_length,), of the sample, -inf for hidden keys and inf for others; None: no key is
        hidden
    sink_logit: the head's one more score of every row, a tensor without dimensions
    bias: what the piece adds to the head's scores is made of
    row_bias: (query_length,), of the sample
    """
    scores, capped = memory("scores", *piece.shape), None
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=engine.scale_of(q), out=scores)
    if engine.softcap is not None:
        scores.div_(engine.softcap).tanh_().mul_(engine.softcap)
        if keep:
            capped = memory("capped", *piece.shape).copy_(scores)
    if bias is not None:
        piece.add_bias(bias, scores)
    if row_bias is not None:
        scores.add_(piece.rows(row_bias[:, None]))
    for part in piece.caps:
        some = scores.narrow(2, part.start, part.stop - part.start)
        torch.minimum(some, part.largest, out=some)
    if key_cap is not None:
        torch.minimum(scores, piece.keys(key_cap[:, None], "cap", memory).mT, out=scores)
    largest = scores.amax(-1, keepdim=True) if some_are_empty or sink_logit is not None else None
    empty = largest == -torch.inf if some_are_empty and largest is not None else None
    engine.weigh_(scores)
    if sink_logit is not None and largest is not None:
        log_sum = largest - scores.amax(-1, keepdim=True).log()
        scores.mul_(torch.sigmoid(log_sum - sink_logit))
    if empty is not None and empty.any():
        scores.masked_fill_(empty, 0.0)
    if bias is not None:
        # A slope leaves far keys weights below the least normal number, with which a processor
        # multiplies many times more slowly.
        torch.threshold_(scores, torch.finfo(scores.dtype).tiny, 0.0)
    return scores, capped
