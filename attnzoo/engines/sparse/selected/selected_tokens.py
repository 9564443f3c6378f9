"""The sparse engine for single keys that the data select.

    A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0,    s_ij = scale · q_i·k_j

Keys that stand anywhere leave nothing to gather in matrix products: a few rows at a time see all
keys before them under a mask, so that memory is linear in the length and time is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.call import Call
from attnzoo.eager import is_recorded, only_autograd_looks
from attnzoo.engines.engine import Backend, Cost, Shape, causal_pairs, never_refuses
from attnzoo.engines.piece_by_piece import at_a_time, join
from attnzoo.engines.softmax import sdpa
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import REFERENCE, visible, weights_of
from attnzoo.engines.softmax.softmax import Softmax, softmax_cost
from attnzoo.engines.sparse.dense import too_large
from attnzoo.engines.sparse.selected.selection import Placed
from attnzoo.sequences.padding import fetched, leading

MASK = 2**22  # entries of a mask of a few rows, held at a time


class TokenSelector(ABC):
    """Selects keys one by one.

    top_k: the most keys that a query sees
    """

    top_k: int

    @abstractmethod
    def shown(self, placed: Placed, rows: slice, length: int) -> Tensor:
        """Which of the first `length` keys some queries see, (batch, choosers, rows, length) bool:
        of those that the masks leave them, the best. choosers divide the query heads: consecutive
        heads share one."""

    @abstractmethod
    def of_one(self, placed: Placed) -> Tensor:
        """The keys that the one query of a call sees, (batch, choosers, top_k), -1 where there are
        fewer: for compiled code, of a call that it takes."""

    @abstractmethod
    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of a selection."""


class SelectedTokens(Softmax):
    """Softmax attention in which a query sees the keys that the data select for it.

    Its backends in order: `native_row`, one query in C++, where that has been compiled; `dense`,
    one SDPA call, where every key is seen; `rows`, a few rows at a time; the reference.

    selector: names the keys that each query sees
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    def __init__(self, selector: TokenSelector, scale: float | None = None) -> None:
        super().__init__(scale)
        self.selector = selector

    def matrix(self, call: Call) -> Tensor:
        placed = Placed.of(call)
        shown = self.selector.shown(placed, slice(0, call.query_length), call.key_length)
        if placed.call is not call and call.key_mask is not None:
            slots = torch.arange(call.key_length, device=shown.device)
            back = (slots - leading(call.key_mask)[:, None]) % call.key_length
            shown = fetched(shown, back, 3)
        shown, mask = _of_heads(shown, call), visible(call)
        return weights_of(self, call, shown if mask is None else shown & mask)

    def cost(self, shape: Shape) -> Cost:
        if shape.key_length <= self.selector.top_k:
            return super().cost(shape)
        support = shape.query_length * self.selector.top_k
        if shape.is_causal:
            beyond = causal_pairs(shape.query_length, shape.key_length - self.selector.top_k)
            support = causal_pairs(shape.query_length, shape.key_length) - beyond
        scores = shape.heads * shape.query_length * shape.key_length
        cost = softmax_cost(shape, scores, shape.heads * support, None)
        return replace(cost, macs=cost.macs + self.selector.macs(shape))


def _of_heads(shown: Tensor, call: Call) -> Tensor:
    """What choosers show, for every head, or for all heads as one."""
    choosers = shown.shape[1]
    return shown if choosers == 1 else shown.repeat_interleave(call.q.shape[1] // choosers, 1)


def _in_rows(engine: SelectedTokens, call: Call) -> Tensor:
    return join(_some_rows(engine, Placed.of(call)), call.query_length, 2)


def _some_rows(engine: SelectedTokens, placed: Placed) -> Iterator[Tensor]:
    call, length = placed.call, int(placed.call.query_length)
    entries = call.q.shape[0] * call.q.shape[1] * int(call.key_length)
    together = at_a_time(length, entries, MASK, call.q)
    weigh = partial(_weigh, engine, placed)
    if torch.is_grad_enabled() and only_autograd_looks(call.q, call.k, call.v):  # keeps no masks
        weigh = partial(checkpoint, weigh, use_reentrant=False, preserve_rng_state=False)
    for start in range(0, length, together):
        some, seen = slice(start, min(start + together, length)), int(call.key_length)
        if call.is_causal and not is_recorded():  # later keys are behind all of these
            seen = max(1, min(seen, call.offset + some.stop))
        yield weigh(call.q, call.k, call.v, some, seen)


def _weigh(
    engine: SelectedTokens,
    placed: Placed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    some: slice,
    seen: int,
) -> Tensor:
    """A·v of some rows, which see none but the first `seen` keys."""
    shown = _of_heads(engine.selector.shown(placed, some, seen), placed.call)
    return sdpa.sdpa(engine, q[:, :, some], k[:, :, :seen], v[:, :, :seen], shown)


def visible_of(placed: Placed, rows: slice | Tensor, length: int, start: int = 0) -> Tensor:
    """Which of the first `length` keys, from `start` on, the masks leave to some queries, (batch or
    1, 1, rows or 1, length - start) bool."""
    call, keys = placed.call, torch.arange(start, length, device=placed.call.q.device)
    seen = (keys < length)[None, None, None]
    if call.key_mask is not None:
        seen = call.key_mask[:, None, None, start:length]
    if call.is_causal:
        seen = seen & (keys <= placed.positions[:, None, rows, None])
    return seen


def _dense_why_not(engine: SelectedTokens, call: Call) -> str | None:
    if call.key_length > engine.selector.top_k:
        return "the selection may hide keys, and a dense mask of them is quadratic in the length"
    return too_large(call) or sdpa.cannot(engine, call)


def _one_row(engine: SelectedTokens, call: Call) -> Tensor:
    if call.key_length <= engine.selector.top_k:
        return one_row.attend(engine, call)
    placed = Placed.of(call)
    return one_row.attend(engine, placed.call, blocks=engine.selector.of_one(placed))


SelectedTokens.backends = (
    one_row.backend(_one_row),
    Backend("dense", sdpa.attend, _dense_why_not),
    Backend("rows", _in_rows, never_refuses),
    REFERENCE,
)
