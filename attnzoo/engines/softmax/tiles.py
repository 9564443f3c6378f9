"""Softmax attention a few rows at a time, on the CPU: products and softmax go to memory that is
used again and stays in cache.

The backward pass makes the weights again, so that autograd holds q, k and v alone: what is smaller
than a cache is computed sooner than it is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.differentiable import Compute, is_followed, open_gradients
from attnzoo.engines.softmax.reference import SoftmaxReference

DTYPES = (torch.float32, torch.float64)  # those in which sums run in the inputs' own precision
SCORES = (
    3 * 2**16
)  # scores that one thread computes at a time: with their keys and values they stay in its cache


class Memory:
    """Tensors by name, each in the place of the one that had its name before."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, of `shape`."""
        view = self._views.get((name, shape))
        if view is None:
            numbers = torch.Size(shape).numel()
            if name not in self._whole or self._whole[name].numel() < numbers:
                self._whole[name] = self._like.new_empty(numbers)
                self._views = {key: kept for key, kept in self._views.items() if key[0] != name}
            view = self._views[name, shape] = self._whole[name][:numbers].view(shape)
        return view


@dataclass(frozen=True)
class Cap:
    """The largest that the scores of keys start..stop may be, broadcastable to (parts, rows, stop -
    start): -inf where hidden, else inf."""

    start: int
    stop: int
    largest: Tensor


class Piece(Protocol):
    """`parts` groups of `size` rows of one head, each with its own `keys` keys; `caps` hide
    some."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """parts, size, keys."""
        ...

    @property
    def caps(self) -> Sequence[Cap]: ...

    def rows(self, x: Tensor) -> Tensor:
        """(query_length, d) -> (parts, size, d), a view."""
        ...

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """(key_length, d) -> (parts, keys, d), a view, or fetched to the memory of this name."""
        ...

    def add(self, gradient: Tensor, total: Tensor) -> None:
        """Add what `keys` sends back, (parts, keys, d), to (key_length, d)."""
        ...


Pieces = Callable[
    [Tensor, "Tensor | None"], Sequence[Sequence[Piece]]
]  # of every head (of every sample), for q and a table that the caller gave


def cap(visible: Tensor, like: Tensor) -> Tensor:
    """The largest that scores may be: inf where visible, -inf elsewhere. A minimum hides a score
    whatever it is; a sum would not hide inf."""
    return torch.where(visible, torch.inf, -torch.inf).to(like.dtype)


def parts_at_a_time(size: int, keys: int, threads: int | None = None) -> int:
    """How many groups of `size` rows with `keys` keys each make a piece. threads: those that share
    it, all by default."""
    return max(1, SCORES // (size * keys)) * (threads or torch.get_num_threads())


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why tiles refuse the call, whatever its pattern; None when they take it."""
    if call.q.dtype not in DTYPES:
        return f"sums of {call.q.dtype} run in float32, and tiles have one dtype"
    return cannot_work_alone(engine, call)


def cannot_work_alone(engine: SoftmaxReference, call: Call) -> str | None:
    """Why a Function of our own may not compute the call; None when it may: on a CPU, without
    dropout, and where neither a graph nor a transform must see the operators inside."""
    if call.q.device.type != "cpu":
        return f"it is for the CPU, got tensors on {call.q.device.type}"
    if engine.dropout > 0 and engine.training:
        return f"it has no dropout, and this attention trains with dropout={engine.dropout}"
    if not only_autograd_looks(call.q, call.k, call.v, *call.inputs.values()):
        return "a graph or transform must see the operators inside"
    return None


def attend(
    engine: SoftmaxReference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cap: Tensor | None,
    table: Tensor | None,
    pieces: Pieces,
    compute: Compute,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """A·v by pieces that hold every row once. key_cap: `cap` of the keys, (batch or 1, key_length).
    table: whatever `pieces` wants.
    compute: the same of q, k, v and sink_logits in operators that autograd can follow, for further
    derivatives. sink_logits: (heads,), one more term in the sum of every row."""
    scale = engine.scale_of(q)
    return _Attend.apply(
        q,
        k,
        v,
        key_cap,
        table,
        None if sink_logits is None else sink_logits.to(q.dtype),
        pieces,
        scale,
        compute,
    )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cap: Tensor | None,
        table: Tensor | None,
        sink_logits: Tensor | None,
        pieces: Pieces,
        scale: float,
        compute: Compute,
    ) -> Tensor:
        out, memory = q.new_empty(*q.shape[:3], v.shape[3]), Memory(q)
        some_are_empty = key_cap is not None or q.shape[2] > k.shape[2]
        for one, kv, found in _heads(q, k, pieces(q, table)):
            queries, keys, values, result = q[one], k[kv], v[kv], out[one]
            sample_cap = _of_sample(key_cap, one[0])
            for piece in found:
                rows = piece.rows(result)
                if not piece.shape[2]:
                    rows.zero_()
                    continue
                its_keys = piece.keys(keys, "fetched", memory)
                weights = _weights(
                    piece,
                    piece.rows(queries),
                    its_keys,
                    sample_cap,
                    _of_head(sink_logits, one[1]),
                    scale,
                    some_are_empty,
                    memory,
                )
                torch.bmm(weights, piece.keys(values, "fetched", memory), out=rows)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.pieces, ctx.scale, ctx.compute = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_cap, table, sink_logits = ctx.saved_tensors
        if is_followed(gradients[0]):
            *to_qkv, to_logits = open_gradients(ctx.compute, (q, k, v, sink_logits), gradients[0])
            return *to_qkv, None, None, to_logits, None, None, None
        gradient, memory = gradients[0].contiguous(), Memory(q)
        dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        to_logits = None if sink_logits is None else torch.zeros_like(sink_logits)
        some_are_empty = key_cap is not None or q.shape[2] > k.shape[2]
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
            sample_cap = _of_sample(key_cap, one[0])
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
                its_keys = piece.keys(keys, "fetched", memory)  # in the place of the values
                weights = _weights(
                    piece,
                    rows,
                    its_keys,
                    sample_cap,
                    _of_head(sink_logits, one[1]),
                    ctx.scale,
                    some_are_empty,
                    memory,
                )
                part = torch.bmm(
                    weights.mT, sent_rows, out=memory("gradient", parts, count, v.shape[3])
                )
                piece.add(part, to_values)
                torch.ops.aten._softmax_backward_data.out(
                    slopes, weights, -1, slopes.dtype, grad_input=slopes
                )
                if to_logits is not None:
                    to_logits[one[1]] -= (
                        slopes.sum()
                    )  # adding one number to every score of a row, its logit's too, changes nothing
                torch.baddbmm(to_rows, slopes, its_keys, beta=0, alpha=ctx.scale, out=to_rows)
                part = memory("gradient", parts, count, k.shape[3])
                torch.baddbmm(part, slopes.mT, rows, beta=0, alpha=ctx.scale, out=part)
                piece.add(part, to_keys)
        return dq, dk, dv, None, None, to_logits, None, None, None


def _heads(
    q: Tensor, k: Tensor, pieces: Sequence[Sequence[Piece]]
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Sequence[Piece]]]:
    """(sample, head), (sample, kv_head) and the head's pieces."""
    group = q.shape[1] // k.shape[1]
    for sample in range(q.shape[0]):
        for head in range(q.shape[1]):
            yield (
                (sample, head),
                (sample, head // group),
                pieces[(sample * q.shape[1] + head) % len(pieces)],
            )


def _of_sample(key_cap: Tensor | None, sample: int) -> Tensor | None:
    return None if key_cap is None else key_cap[sample if key_cap.shape[0] > 1 else 0]


def _of_head(sink_logits: Tensor | None, head: int) -> Tensor | None:
    return None if sink_logits is None else sink_logits[head]


def _weights(
    piece: Piece,
    q: Tensor,
    k: Tensor,
    key_cap: Tensor | None,
    sink_logit: Tensor | None,
    scale: float,
    some_are_empty: bool,
    memory: Memory,
) -> Tensor:
    """Softmax of the piece's scores, (parts, size, keys); rows that see no key are 0."""
    scores = memory("scores", *piece.shape)
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=scale, out=scores)
    for part in piece.caps:
        some = scores.narrow(2, part.start, part.stop - part.start)
        torch.minimum(some, part.largest, out=some)
    if key_cap is not None:
        torch.minimum(scores, piece.keys(key_cap[:, None], "cap", memory).mT, out=scores)
    largest = scores.amax(-1, keepdim=True) if some_are_empty or sink_logit is not None else None
    empty = largest == -torch.inf if some_are_empty and largest is not None else None
    torch.softmax(scores, -1, out=scores)
    if sink_logit is not None and largest is not None:
        log_sum = largest - scores.amax(-1, keepdim=True).log()
        scores.mul_(torch.sigmoid(log_sum - sink_logit))
    return scores if empty is None or not empty.any() else scores.masked_fill_(empty, 0.0)


@dataclass(frozen=True)
class Slices:
    """Consecutive rows, `size` to a part, from `first` on; the keys of the first part begin at
    `low`, those of the next `size` later."""

    first: int
    shape: tuple[int, int, int]
    low: int
    caps: tuple[Cap, ...] = ()

    def rows(self, x: Tensor) -> Tensor:
        parts, size, _ = self.shape
        line, number = x.stride()  # one view, not three: there are many pieces
        return x.as_strided(
            (parts, size, x.shape[1]),
            (size * line, line, number),
            x.storage_offset() + self.first * line,
        )

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        parts, size, keys = self.shape
        line, number = x.stride()
        return x.as_strided(
            (parts, keys, x.shape[1]),
            (size * line, line, number),
            x.storage_offset() + self.low * line,
        )

    def add(self, gradient: Tensor, total: Tensor) -> None:
        parts, size, keys = self.shape
        if parts == 1:
            self._span(total).add_(gradient[0])
        elif not gradient.is_contiguous():
            for part, its_gradient in enumerate(gradient):
                total.narrow(0, self.low + part * size, keys).add_(its_gradient)
        else:
            unit, width = gcd(size, keys), total.shape[1]
            index = torch.arange(parts)[:, None] * (size // unit) + torch.arange(keys // unit)
            self._span(total).view(-1, unit, width).index_add_(
                0, index.flatten(), gradient.view(-1, unit, width)
            )

    def _span(self, x: Tensor) -> Tensor:
        parts, size, keys = self.shape
        return x.narrow(0, self.low, (parts - 1) * size + keys)
