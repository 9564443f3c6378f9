"""Engine 2, sparse: softmax over the keys that a pattern shows to each query.

`Sparse` takes any pattern, and its reference forms A whole. `WindowSparse` (windows) and
`BlockSparse` (blocks) have backends for windows and for whole blocks that never do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import Backend, Cost, Shape, StateSizes, causal_pairs
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.reference import REFERENCE
from attnzoo.engines.softmax.softmax import Softmax, softmax_cost
from attnzoo.engines.sparse import dense
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.reference import SparseReference
from attnzoo.sequences.padding import moved_back, moved_behind, squared, starts_real

Run = Callable[[Any, Call], Tensor]
WhyNot = Callable[[Any, Call], str | None]


class Sparse(SparseReference, Softmax):
    """Softmax attention in which a query sees the keys that `pattern` shows it.

    pattern: which keys each query sees; the masks of a call hide some of them
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    """

    counted_apart = True

    backends = (Backend("dense", dense.attend, dense.why_not), REFERENCE)

    @property
    def reach(self) -> int | None:
        return self.pattern.reach

    def init_state(self, sizes: StateSizes) -> Any:
        kept = None if self.pattern.reach is None else self.pattern.reach - 1
        return KeyValueCache.empty(sizes, kept)

    def cost(self, shape: Shape) -> Cost:
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        executed = support = shape.heads * shape.query_length * shape.key_length
        if not dense.is_whole(self.pattern, grid):
            cost = self.sparse_cost(shape, grid)
            if self.is_dense(grid):
                whole = softmax_cost(shape, executed, support, self.pattern.remembers)
                cost = replace(cost, macs=whole.macs, elementwise=whole.elementwise)
            return self.with_softcap(cost, shape)
        if shape.is_causal:
            support = shape.heads * causal_pairs(shape.query_length, shape.key_length)
        cost = softmax_cost(shape, executed, support, self.pattern.remembers)
        cost = replace(cost, skipped_macs=cost.macs - cost.support_macs)
        return self.with_softcap(cost, shape)

    def is_dense(self, grid: Grid) -> bool:
        """Whether backend="auto" takes the backend `dense` for a call of this size without
        masks."""
        whole = dense.is_whole(self.pattern, grid)
        return self.softcap is None and (whole or self.is_short(grid))

    def sparse_cost(self, shape: Shape, grid: Grid) -> Cost:
        """The cost of a call in which the pattern hides keys.

        shape: the sizes of the call
        grid: the same sizes as the pattern takes them
        """
        executed = shape.heads * shape.query_length * shape.key_length
        support = _count_pairs(self.pattern, grid)
        return softmax_cost(shape, executed, support, self.pattern.remembers)


def _count_pairs(pattern: Pattern, grid: Grid) -> int:
    """How many (head, query, key) triples are visible, counted in the whole mask that the reference
    forms."""
    mask = pattern.mask(grid)
    if grid.is_causal:
        mask = mask & torch.ones(grid.query_length, grid.key_length, dtype=torch.bool).tril(
            grid.offset
        )
    return int(mask.sum()) * (grid.heads // mask.shape[0])


def from_first_real(name: str, run: Run, why_not: WhyNot) -> Backend:
    """A backend whose positions count from the first real token of every sample, made of functions
    that count from the first slot.

    Leading padding is moved behind the end of its sample before the call runs, and the rows of the
    output are moved back.

    name: the backend's name
    run: computes A·v of an engine and a call
    why_not: says why `run` refuses a call, or None
    """

    @wraps(run)
    def run_moved(engine: Any, call: Call) -> Tensor:
        if not _counts_otherwise(engine, call):
            return run(engine, call)
        assert call.key_mask is not None
        out = run(engine, moved_behind(squared(call)))
        return moved_back(out, call.key_mask)[:, :, call.offset :]

    @wraps(why_not)
    def refuses(engine: Any, call: Call) -> str | None:
        fits = call.query_length > 1 and (call.offset == 0 or (call.offset > 0 and call.is_causal))
        if not fits and _counts_otherwise(engine, call):
            return (
                "samples may begin with padding, and there are not as many queries as keys: only "
                "the reference counts their positions"
            )
        return why_not(engine, call)

    return Backend(name, run_moved, refuses)


def _counts_otherwise(engine: SparseReference, call: Call) -> bool:
    """Whether the pattern depends on positions, and a sample may begin with padding."""
    return engine.pattern.counts_positions and not starts_real(call.key_mask)
