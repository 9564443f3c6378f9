"""The sparse engine of factorized attention: scores of each factor by products of blocks, side by
side in one softmax.

Positions stand in rows of `stride`. What is near are the query's own row and those beside it; keys
a multiple of the stride away are a column; summaries are the last columns of all rows. None needs
an index, and with the stride at √n all scores together are n·√n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import (
    SOFTMAX_OPERATIONS,
    Cost,
    Shape,
    accumulation_dtype,
    never_refuses,
)
from attnzoo.engines.softmax.native import attend as native
from attnzoo.engines.softmax.reference import REFERENCE, masked_softmax
from attnzoo.engines.softmax.sdpa import sdpa
from attnzoo.engines.softmax.softmax import softmax_cost
from attnzoo.engines.sparse import dense, masked_tiles
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.sparse import Sparse, from_first_real
from attnzoo.variants.sparse_transformer import factorized_flash
from attnzoo.variants.sparse_transformer.factorized_layout import Near, Rows, shown
from attnzoo.variants.sparse_transformer.factorized_patterns import ByHead, Factor, Strided
from attnzoo.variants.sparse_transformer.factorized_shares import shares_of


class Factorized(Sparse):
    """Softmax over the keys that two factors show.

    near, far: the factors, which show keys near the query and keys at all distances
    merged: whether every head sees the keys of both; else heads see those of one, in turn
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    """

    def __init__(
        self,
        near: Factor,
        far: Factor,
        merged: bool,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(near | far if merged else ByHead((near, far)), scale, dropout)
        self.factors, self.merged = (near, far), merged

    def heads_of(self, heads: int) -> list[tuple[tuple[Factor, ...], list[int]]]:
        """The factors that heads see together, and these heads."""
        if not isinstance(self.pattern, ByHead):
            return [(self.factors, list(range(heads)))]
        return [((factor,), own) for factor, own in self.pattern.heads_of(heads)]

    def keep_heads(self, first: int) -> None:
        """Begin at head `first` of those before."""
        if isinstance(self.pattern, ByHead):
            self.pattern = replace(self.pattern, first_head=self.pattern.first_head + first)

    def is_dense(self, grid: Grid) -> bool:
        return grid.query_length > 1 and super().is_dense(grid)

    def cost(self, shape: Shape) -> Cost:
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        executed = support = weighed = 0
        for factors, heads in self.heads_of(shape.heads):
            support += len(heads) * _count_visible(factors, grid)
            one = len(_keys_of_one(factors, grid)) if grid.query_length == 1 else None
            executed += len(heads) * (_count_computed(factors, grid) if one is None else one)
            weighed += len(heads) * (_count_weighed(factors, grid) if one is None else one)
        if self.is_dense(grid):
            executed = weighed = shape.heads * shape.query_length * shape.key_length
        cost = softmax_cost(shape, executed, support, None)
        return replace(cost, elementwise=SOFTMAX_OPERATIONS * shape.batch_size * weighed)


def _attend(engine: Factorized, factors: tuple[Factor, ...], call: Call, grid: Grid) -> Tensor:
    """A·v of heads that see these factors together."""
    rows, dtype = Rows.of(factors[0].stride, grid), accumulation_dtype(call.q.dtype)
    scale = engine.scale_of(call.q)
    q = rows.queries(call.q.to(dtype) * scale)
    k, v = (rows.keys(repeat_heads(x, call.group).to(dtype)) for x in (call.k, call.v))
    key_mask = None if call.key_mask is None else rows.keys(call.key_mask[:, None, :, None])
    i = (torch.arange(rows.count * rows.stride, device=q.device) + rows.first * rows.stride).view(
        rows.count, rows.stride, 1
    )
    shares = shares_of(factors, rows, grid)
    parts, scores = [share.part for share in shares], []
    for share, part in zip(shares, parts, strict=True):
        seen = shown(share.factor, share.near, grid, i, part.positions(q.device))
        if key_mask is not None:
            seen = seen & part.mask(key_mask)
        scores.append(part.scores(q, k).masked_fill(~seen, float("-inf")))
    attention = torch.nn.functional.dropout(
        masked_softmax(torch.cat(scores, -1)), engine.dropout, engine.training
    )
    weighed = zip(parts, attention.split([part.width for part in parts], -1), strict=True)
    out = sum(
        (part.times(weights, v) for part, weights in weighed),
        start=torch.zeros((), dtype=dtype, device=q.device),
    )
    return rows.taken(out).to(call.q.dtype)


def _attend_one(engine: Factorized, factors: tuple[Factor, ...], call: Call, grid: Grid) -> Tensor:
    """A·v of a single query: its keys, fetched."""
    keys = torch.tensor(_keys_of_one(factors, grid), dtype=torch.long, device=call.q.device)
    if not len(keys):
        return torch.zeros_like(call.q[..., :1]).expand(*call.q.shape[:3], call.v.shape[3])
    mask = None if call.key_mask is None else call.key_mask[:, keys][:, None, None]
    return sdpa(engine, call.q, call.k.index_select(2, keys), call.v.index_select(2, keys), mask)


def _by_groups(attend: AttendFactors, engine: Factorized, call: Call) -> Tensor:
    """A·v, the heads of every group of factors by themselves."""
    grid, groups = grid_of(call), engine.heads_of(call.q.shape[1])
    if len(groups) == 1:
        return attend(engine, groups[0][0], call, grid)
    rows, order = [], []
    for factors, heads in groups:
        index = torch.tensor(heads, device=call.q.device)
        shared = index // call.group
        k, v = call.k.index_select(1, shared), call.v.index_select(1, shared)
        own = replace(call, q=call.q.index_select(1, index), k=k, v=v)
        rows.append(attend(engine, factors, own, replace(grid, heads=len(heads))))
        order += heads
    return torch.cat(rows, 1).index_select(1, torch.tensor(order, device=call.q.device).argsort())


AttendFactors = Callable[[Factorized, tuple[Factor, ...], Call, Grid], Tensor]
_one_row = partial(_by_groups, _attend_one)
_blocks = partial(_by_groups, _attend)


def _one_row_why_not(engine: Factorized, call: Call) -> str | None:
    return None if call.query_length == 1 else f"it is for one query, got {call.query_length}"


def _by_flash(engine: Factorized, call: Call) -> Tensor:
    frame = call.frame()  # what `compute` holds is freed late

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _blocks(engine, frame(q, k, v))

    groups = engine.heads_of(call.q.shape[1])
    return factorized_flash.attend(engine, groups, call, grid_of(call), compute)


def _keys_of_one(factors: tuple[Factor, ...], grid: Grid) -> list[int]:
    position = grid.offset
    limit = min(position + 1, grid.key_length) if grid.is_causal else grid.key_length
    return sorted(
        {key for factor in factors for some in factor.ranges(position, limit) for key in some}
    )


def _count_computed(factors: tuple[Factor, ...], grid: Grid) -> int:
    """(query, key) pairs of one head, as products lay them out."""
    rows, total = Rows.of(factors[0].stride, grid), 0
    for share in shares_of(factors, rows, grid):
        if isinstance(share.part, Near):
            keys = sum(len(own) * len(places) * rows.stride for own, places in share.part.runs())
        else:
            keys = rows.count * share.part.width
        total += rows.stride * keys
    return total


def _count_weighed(factors: tuple[Factor, ...], grid: Grid) -> int:
    """(query, key) pairs of one head that the softmax of a trace goes over: with what lies beyond
    either end."""
    rows = Rows.of(factors[0].stride, grid)
    return (
        rows.count * rows.stride * sum(share.part.width for share in shares_of(factors, rows, grid))
    )


def _count_visible(factors: tuple[Factor, ...], grid: Grid) -> int:
    """(query, key) pairs of one head."""
    positions = torch.arange(grid.offset, grid.key_length)
    limit = (
        (positions + 1).clamp(min=0)
        if grid.is_causal
        else torch.full_like(positions, grid.key_length)
    )
    total = sum(int(factor.count(positions, limit).sum()) for factor in factors)
    if len(factors) == 1:
        return total
    near, far = factors
    if isinstance(far, Strided):  # both show the query itself, and the keys one stride away
        others = [positions + step * far.stride for step in (-1, 0, 1)]
        return total - sum(int(((other >= 0) & (other < limit)).sum()) for other in others)
    start = positions.div(near.stride, rounding_mode="floor") * near.stride
    return total - int(
        (
            far.count(positions, limit.minimum(start + near.stride))
            - far.count(positions, limit.minimum(start))
        ).sum()
    )


def _native_why_not(engine: Factorized, call: Call) -> str | None:
    if not masked_tiles.serves(engine, call):
        return (
            "it is for short inputs whose samples begin with real tokens, by one mask of all pairs"
        )
    return native.why_not(engine, call)


Factorized.backends = (
    replace(
        from_first_real("native", masked_tiles.attend, _native_why_not),
        untried=lambda engine, call: native.passed_over(call),
        skips_padding=lambda engine, call: True,
    ),
    from_first_real("one_row", _one_row, _one_row_why_not),
    from_first_real("dense", dense.attend, dense.why_not),
    from_first_real("flash", _by_flash, factorized_flash.why_not),
    from_first_real("blocks", _blocks, never_refuses),
    REFERENCE,
)
