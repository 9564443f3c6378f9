"""The sparse engine of factorized attention: scores of each factor by products of blocks, side by side in one softmax.

Positions stand in rows of `stride`. What is near are the query's own row and those beside it; keys a multiple of the stride away are a column;
summaries are the last columns of all rows. None needs an index, and with the stride at √n all scores together are n·√n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines import peaks
from attnzoo.engines.engine import Backend, Cost, Shape, accumulation_dtype, never_refuses
from attnzoo.engines.factorized_memory import Layout, Share
from attnzoo.engines.memory import INDEX_BYTES, fused
from attnzoo.engines.softmax import masked_softmax, sdpa, softmax_cost
from attnzoo.engines.sparse import Sparse, reference
from attnzoo.factorized_patterns import ByHead, Factor, Neighbours, OwnBlock, Strided, Summaries
from attnzoo.patterns import Grid, grid_of


class Factorized(Sparse):
    """Softmax over the union of two factors, `merged`, or over one of them in every head, in turn."""

    def __init__(self, near: Factor, far: Factor, merged: bool, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__(near | far if merged else ByHead((near, far)), scale, dropout)
        self.factors, self.merged = (near, far), merged

    def heads_of(self, heads: int) -> list[tuple[tuple[Factor, ...], list[int]]]:
        """Factors that heads see together, and these heads."""
        if not isinstance(self.pattern, ByHead):
            return [(self.factors, list(range(heads)))]
        return [((factor,), own) for factor, own in self.pattern.heads_of(heads)]

    def keep_heads(self, first: int) -> None:
        """Begin at head `first` of those before."""
        if isinstance(self.pattern, ByHead):
            self.pattern = replace(self.pattern, first_head=self.pattern.first_head + first)

    def cost(self, shape: Shape) -> Cost:
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        executed = support = 0
        for factors, heads in self.heads_of(shape.heads):
            support += len(heads) * _count_visible(factors, grid)
            executed += len(heads) * (len(_keys_of_one(factors, grid)) if grid.query_length == 1 else _count_computed(factors, grid))
        cost = softmax_cost(shape, executed, support, None, self._kept_bytes(shape, grid))
        forward_bytes, training_bytes = self._peaks(shape, grid)
        return replace(cost, forward_bytes=forward_bytes, training_bytes=training_bytes)

    def _kept_bytes(self, shape: Shape, grid: Grid) -> int:
        groups = self.heads_of(shape.heads)
        kept = INDEX_BYTES * shape.heads if len(groups) > 1 else 0  # the order of heads
        for factors, heads in groups:
            keys = len(_keys_of_one(factors, grid)) if shape.query_length == 1 else 0
            if shape.query_length == 1 and not keys:
                continue
            kv_heads = shape.kv_heads
            if len(groups) > 1:  # which heads these are, and which keys are theirs
                kv_heads, kept = len(heads), kept + 2 * len(heads) * INDEX_BYTES
            if not keys:
                kept += _layout(factors, shape, grid, len(heads)).kept()
            else:
                one = replace(shape, heads=len(heads), kv_heads=kv_heads, key_length=keys)
                kept += one.input_bytes + fused(one, len(heads)) + keys * INDEX_BYTES
        return kept

    def _peaks(self, shape: Shape, grid: Grid) -> tuple[int, int]:
        """Of a forward, and of both passes: of all groups of heads one after the other, with what the others have left."""
        groups = self.heads_of(shape.heads)
        forward = training = done = kept = given = 0
        for factors, heads in groups:
            kv_heads = shape.kv_heads if len(groups) == 1 else len(heads)
            own = replace(shape, heads=len(heads), kv_heads=kv_heads)
            copies = own.input_bytes if len(groups) > 1 else 0
            if shape.query_length == 1:
                one = replace(own, key_length=max(1, len(_keys_of_one(factors, grid))))
                its_forward, its_training = 2 * one.key_bytes + peaks.forward(one), 2 * one.key_bytes + shape.input_bytes + peaks.training(one)
                its_kept = 2 * one.key_bytes
            else:
                layout = _layout(factors, shape, grid, len(heads))
                its_forward, its_training, its_kept = layout.forward(), layout.training(own.query_bytes), layout.kept()
            forward = max(forward, done + copies + its_forward)
            training = max(training, done + kept + copies + its_training)
            done, kept, given = done + own.query_bytes, kept + its_kept, given + copies
        if len(groups) == 1:
            return forward, max(training, forward)
        every = shape.query_bytes + shape.input_bytes  # the output and all gradients
        return max(forward, 3 * done), max(training, every + shape.input_bytes, every + kept)


@dataclass(frozen=True)
class _Rows:
    """Where queries and keys stand when they are laid in rows of `stride`: queries in `count` rows from row `first` on, keys in `key_rows`."""

    stride: int
    first: int
    count: int
    key_rows: int
    ahead: int
    spare: int

    @classmethod
    def of(cls, stride: int, grid: Grid) -> _Rows:
        ahead, spare = grid.offset % stride, -grid.key_length % stride
        count = (ahead + grid.query_length + spare) // stride
        return cls(stride, grid.offset // stride, count, (grid.key_length + spare) // stride, ahead, spare)

    def queries(self, x: Tensor) -> Tensor:
        """(batch, heads, query_length, d) -> (batch, heads, count, stride, d)."""
        return torch.nn.functional.pad(x, (0, 0, self.ahead, self.spare)).unflatten(2, (self.count, self.stride))

    def keys(self, x: Tensor) -> Tensor:
        """(batch, heads, key_length, d) -> (batch, heads, key_rows, stride, d)."""
        return torch.nn.functional.pad(x, (0, 0, 0, self.spare)).unflatten(2, (self.key_rows, self.stride))


@dataclass(frozen=True)
class _Near:
    """Keys of the query's own row, and of so many rows before and behind."""

    rows: _Rows
    before: int
    after: int

    @property
    def width(self) -> int:
        return (self.before + 1 + self.after) * self.rows.stride

    def keys(self, x: Tensor) -> Tensor:
        """(batch, heads, key_rows, stride, d) -> (batch, heads, count, width, d)."""
        first = self.rows.first - self.before
        missing = max(0, -first)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, missing, self.after))
        shifted = [x[:, :, first + missing + place :][:, :, : self.rows.count] for place in range(self.before + 1 + self.after)]
        return torch.cat(shifted, 3)

    def positions(self, device: torch.device) -> Tensor:
        """Of the keys, broadcastable to (count, stride, width)."""
        rows = torch.arange(self.rows.first - self.before, self.rows.first - self.before + self.rows.count, device=device)
        return rows[:, None, None] * self.rows.stride + torch.arange(self.width, device=device)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ self.keys(k).mT

    def times(self, attention: Tensor, v: Tensor) -> Tensor:
        return attention @ self.keys(v)

    def mask(self, key_mask: Tensor) -> Tensor:
        """(batch, 1, key_rows, stride, 1) -> broadcastable to (batch, heads, count, stride, width)."""
        return self.keys(key_mask.to(torch.uint8)).mT.bool()


@dataclass(frozen=True)
class _Columns:
    """Keys of the query's own column."""

    rows: _Rows

    @property
    def width(self) -> int:
        return self.rows.key_rows

    def positions(self, device: torch.device) -> Tensor:
        column = torch.arange(self.rows.stride, device=device)[:, None]
        return (torch.arange(self.width, device=device) * self.rows.stride + column)[None]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q.transpose(2, 3) @ k.transpose(2, 3).mT).transpose(2, 3)

    def times(self, attention: Tensor, v: Tensor) -> Tensor:
        return (attention.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)

    def mask(self, key_mask: Tensor) -> Tensor:
        return key_mask[..., 0].mT[:, :, None]


@dataclass(frozen=True)
class _Last:
    """Keys of the last columns of all rows."""

    rows: _Rows
    columns: int

    @property
    def width(self) -> int:
        return self.rows.key_rows * self.columns

    def keys(self, x: Tensor) -> Tensor:
        return x[:, :, :, self.rows.stride - self.columns :].flatten(2, 3)

    def positions(self, device: torch.device) -> Tensor:
        every = torch.arange(self.rows.key_rows * self.rows.stride, device=device)
        return self.keys(every.view(1, 1, self.rows.key_rows, -1, 1)).view(1, 1, -1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q.flatten(2, 3) @ self.keys(k).mT).unflatten(2, q.shape[2:4])

    def times(self, attention: Tensor, v: Tensor) -> Tensor:
        return (attention.flatten(2, 3) @ self.keys(v)).unflatten(2, attention.shape[2:4])

    def mask(self, key_mask: Tensor) -> Tensor:
        return self.keys(key_mask).mT[:, :, None]


def _part(factor: Factor, rows: _Rows, is_causal: bool) -> _Near | _Columns | _Last:
    if isinstance(factor, Neighbours):
        return _Near(rows, 1, 0 if is_causal else 1)
    if isinstance(factor, OwnBlock):
        return _Near(rows, 0, 0)
    if isinstance(factor, Strided):
        return _Columns(rows)
    assert isinstance(factor, Summaries)
    return _Last(rows, factor.width)


def _layout(factors: tuple[Factor, ...], shape: Shape, grid: Grid, heads: int) -> Layout:
    """What `_attend` lays out, in numbers."""
    rows, shares = _Rows.of(factors[0].stride, grid), []
    for factor in factors:
        part = _part(factor, rows, grid.is_causal)
        near = part.before + 1 + part.after if isinstance(part, _Near) else 0
        is_alike = factor is factors[0] and not near and not grid.is_causal  # for every row, and for every column unless columns differ in keys
        columns = rows.stride if isinstance(part, _Columns) else 1
        shown = part.width * (columns if is_alike else rows.count * rows.stride)
        measured = rows.count * rows.stride * part.width if isinstance(factors[0], Neighbours) else 0
        shares.append(Share(part.width, near, isinstance(part, _Columns), part.columns if isinstance(part, _Last) else 0, shown, measured))
    return Layout(shape, heads, rows.stride, rows.count, rows.key_rows, tuple(shares))


_SHOWN: dict[type[Factor], Callable[[Tensor, Tensor, int], Tensor]] = {
    Neighbours: lambda i, j, stride: (i - j).abs() <= stride,
    OwnBlock: lambda i, j, stride: i - i % stride == j - j % stride,
}
"""Which of the keys that are computed for the first factor it shows; those of the second are all its own."""


def _visible(factor: Factor, near: Factor | None, part: _Near | _Columns | _Last, grid: Grid, device: torch.device) -> Tensor:
    """(count, stride, width) or what broadcasts to it. near: the factor that shows some of the keys already."""
    rows = part.rows
    i = (torch.arange(rows.count * rows.stride, device=device) + rows.first * rows.stride).view(rows.count, rows.stride, 1)
    j = part.positions(device)
    seen = (j >= 0) & (j < grid.key_length)
    if grid.is_causal:
        seen = seen & (j <= i)
    if type(factor) in _SHOWN:
        seen = seen & _SHOWN[type(factor)](i, j, rows.stride)
    return seen if near is None else seen & ~_SHOWN[type(near)](i, j, rows.stride)


def _attend(engine: Factorized, factors: tuple[Factor, ...], call: Call, grid: Grid) -> Tensor:
    """A·v of heads that see these factors together."""
    rows, dtype = _Rows.of(factors[0].stride, grid), accumulation_dtype(call.q.dtype)
    scale = engine.scale_of(call.q)
    q = rows.queries(call.q.to(dtype) * scale)
    k, v = (rows.keys(repeat_heads(x, call.group).to(dtype)) for x in (call.k, call.v))
    key_mask = None if call.key_mask is None else rows.keys(call.key_mask[:, None, :, None])
    parts, scores = [_part(factor, rows, grid.is_causal) for factor in factors], []
    for factor, part in zip(factors, parts, strict=True):
        seen = _visible(factor, None if factor is factors[0] else factors[0], part, grid, q.device)
        if key_mask is not None:
            seen = seen & part.mask(key_mask)
        scores.append(part.scores(q, k).masked_fill(~seen, float("-inf")))
    attention = torch.nn.functional.dropout(masked_softmax(torch.cat(scores, -1)), engine.dropout, engine.training)
    shares = zip(parts, attention.split([part.width for part in parts], -1), strict=True)
    out = sum((part.times(share, v) for part, share in shares), start=torch.zeros((), dtype=dtype, device=q.device))
    return out.flatten(2, 3)[:, :, rows.ahead : rows.ahead + grid.query_length].to(call.q.dtype)


def _attend_one(engine: Factorized, factors: tuple[Factor, ...], call: Call, grid: Grid) -> Tensor:
    """A·v of a single query: its keys, fetched."""
    keys = torch.tensor(_keys_of_one(factors, grid), dtype=torch.long, device=call.q.device)
    if not len(keys):
        return torch.zeros_like(call.q[..., :1]).expand(*call.q.shape[:3], call.v.shape[3])
    mask = None if call.key_mask is None else call.key_mask[:, keys][:, None, None]
    return sdpa(engine, call.q, call.k.index_select(2, keys), call.v.index_select(2, keys), mask)


def _blocks(engine: Factorized, call: Call) -> Tensor:
    grid, groups = grid_of(call), engine.heads_of(call.q.shape[1])
    attend = _attend_one if grid.query_length == 1 else _attend
    if len(groups) == 1:
        return attend(engine, groups[0][0], call, grid)
    rows, order = [], []
    for factors, heads in groups:
        index = torch.tensor(heads, device=call.q.device)
        shared = index // call.group
        own = replace(call, q=call.q.index_select(1, index), k=call.k.index_select(1, shared), v=call.v.index_select(1, shared))
        rows.append(attend(engine, factors, own, replace(grid, heads=len(heads))))
        order += heads
    return torch.cat(rows, 1).index_select(1, torch.tensor(order, device=call.q.device).argsort())


def _keys_of_one(factors: tuple[Factor, ...], grid: Grid) -> list[int]:
    position = grid.offset
    limit = min(position + 1, grid.key_length) if grid.is_causal else grid.key_length
    return sorted({key for factor in factors for some in factor.ranges(position, limit) for key in some})


def _count_computed(factors: tuple[Factor, ...], grid: Grid) -> int:
    """(query, key) pairs of one head."""
    rows = _Rows.of(factors[0].stride, grid)
    return rows.count * rows.stride * sum(_part(factor, rows, grid.is_causal).width for factor in factors)


def _count_visible(factors: tuple[Factor, ...], grid: Grid) -> int:
    """(query, key) pairs of one head."""
    positions = torch.arange(grid.offset, grid.key_length)
    limit = (positions + 1).clamp(min=0) if grid.is_causal else torch.full_like(positions, grid.key_length)
    total = sum(int(factor.count(positions, limit).sum()) for factor in factors)
    if len(factors) == 1:
        return total
    near, far = factors
    if isinstance(far, Strided):  # both show the query itself, and the keys one stride away
        others = [positions + step * far.stride for step in (-1, 0, 1)]
        return total - sum(int(((other >= 0) & (other < limit)).sum()) for other in others)
    start = positions.div(near.stride, rounding_mode="floor") * near.stride
    return total - int((far.count(positions, limit.minimum(start + near.stride)) - far.count(positions, limit.minimum(start))).sum())


Factorized.backends = (Backend("blocks", _blocks, never_refuses), Backend("reference", reference, never_refuses))
