"""A window and global tokens: every row sees the global tokens beside its window, and a global token's row sees every key.

The keys of the global tokens are fetched and laid beside every slice of the window as more columns, so that one softmax goes over both; in
the window itself they are hidden, so that a key counts once. The rows of the global tokens are computed apart and written over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.arguments import check_count
from attnzoo.call import Call
from attnzoo.engines import in_cache, sparse_dilated, sparse_flex, sparse_windows
from attnzoo.engines.engine import Backend, Cost, Shape, never_refuses
from attnzoo.engines.global_cache import GlobalCache, fetched
from attnzoo.engines.pieces import join
from attnzoo.engines.softmax import attend_densely, sdpa, softmax_cost, visible
from attnzoo.engines.sparse import Sparse, grid_of
from attnzoo.patterns import Grid, Window


class WindowAndGlobals(Sparse):
    """Softmax over a window and the global tokens: those of the call's global_mask, and the first `global_tokens` real ones of every sample."""

    pattern: Window

    def __init__(self, pattern: Window, global_tokens: int = 0, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__(pattern, scale, dropout)
        self.global_tokens = check_count("global_tokens", global_tokens)

    def forward(self, call: Call, backend: str = "auto") -> tuple[Tensor, str]:
        return super().forward(self._with_globals(call), backend)

    def _with_globals(self, call: Call) -> Call:
        """The call with all its global tokens in its global_mask, and with their counts."""
        if call.global_mask is None and not self.global_tokens:
            return replace(call, global_qkv=None)
        first = min(self.global_tokens, call.key_length)
        if call.key_mask is None:
            mask = (torch.arange(call.key_length, device=call.q.device) < first).expand(call.k.shape[0], -1)
        else:
            mask = call.key_mask & (call.key_mask.cumsum(1) <= first)
        if call.global_mask is not None:
            mask = mask | (call.global_mask if call.key_mask is None else call.global_mask & call.key_mask)
            counts = _most(mask), _most(_of_queries(mask, call))
        elif call.key_mask is None:
            counts = first, min(max(0, first - call.offset), call.query_length, first)
        else:
            counts = _most(mask, first), _most(_of_queries(mask, call), min(first, call.query_length))
        return replace(call, global_mask=mask, global_counts=counts) if counts[0] else replace(call, global_mask=None, global_qkv=None)

    def init_state(self, batch_size: int, kv_heads: int, head_dim: int, max_length: int | None, dtype: torch.dtype, device: Any) -> GlobalCache:
        return GlobalCache.around(super().init_state(batch_size, kv_heads, head_dim, max_length, dtype, device), self.global_tokens)

    def step(self, call: Call, state: GlobalCache, backend: str) -> tuple[Tensor, GlobalCache, str]:
        mask = state.new_globals(call, self.pattern.reach)
        most = 0 if mask is None else _most(mask)
        counts = (state.kept + most, most)
        whole = replace(state.joined(call, mask), global_counts=counts)
        if not counts[0]:
            whole = replace(whole, key_mask=None if state.is_unmasked(call) else whole.key_mask, global_mask=None, global_qkv=None)
        out, name = super().forward(whole, backend)
        return out, state.append(call, mask, None if mask is None else slots_of(mask, most)), name

    def cost(self, shape: Shape) -> Cost:
        if not self.global_tokens:
            return super().cost(shape)
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        keys = min(self.global_tokens, shape.key_length)
        queries = min(max(0, keys - grid.offset), shape.query_length, keys)
        executed = sparse_dilated.count_executed(self.pattern, shape) + shape.heads * queries * shape.key_length
        for part in sparse_dilated.parts(self.pattern, shape):
            executed += part.shape.batch_size // shape.batch_size * part.heads * part.shape.query_length * keys
        cost = softmax_cost(shape, executed, sparse_dilated.count_support(self.pattern, grid, keys), self.pattern.reach, None)
        a_token = 2 * shape.batch_size * shape.kv_heads * shape.head_dim  # numbers of its key and value
        kept = cost.state_elements + a_token * keys
        growing = (shape.key_length < self.global_tokens) * a_token * shape.dtype.itemsize
        return replace(cost, state_elements=kept, state_bytes=kept * shape.dtype.itemsize, state_growth=cost.state_growth + growing)


def _most(mask: Tensor, bound: int | None = None) -> int:
    """The most True in a row of (batch, length); `bound`, where there is one and a look would stall."""
    stalls = mask.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return bound if bound is not None and stalls else int(mask.sum(1).amax()) if mask.numel() else 0


def _of_queries(mask: Tensor, call: Call) -> Tensor:
    """(batch, key_length) -> (batch, query_length): what stands at the queries' positions, False before the first."""
    return torch.nn.functional.pad(mask, (max(0, -call.offset), 0))[:, max(0, call.offset) :]


def slots_of(mask: Tensor, count: int) -> Tensor:
    """Where the True of every row of (batch, length) stand, ascending, (batch, count); where there are fewer, other slots, each once."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :count].clone()  # not a view: it is kept for the backward pass


@dataclass(frozen=True)
class _Columns:
    """The global tokens as keys of every row: k, v: (batch, kv_heads, count, head_dim); real: (batch, count), False where a sample has
    fewer; slots: (batch, count), theirs among the keys."""

    k: Tensor
    v: Tensor
    real: Tensor
    slots: Tensor

    @property
    def count(self) -> int:
        return self.k.shape[2]

    def in_classes(self, dilation: int, places: int) -> _Columns:
        """The same columns for every residue class, folded into the batch, with slots in places: those that causality shows to the same rows."""
        k, v, real = (x.repeat_interleave(dilation, 0) for x in (self.k, self.v, self.real))
        classes = torch.arange(dilation, device=k.device)[:, None]
        rounded_up = torch.arange(places + 1, device=k.device).repeat_interleave(dilation)  # of a position, by looking it up: no division to count
        slots = rounded_up[self.slots[:, None] - classes + dilation - 1].flatten(0, 1)
        return _Columns(k, v, real, slots)


def _blocks(engine: WindowAndGlobals, call: Call) -> Tensor:
    if call.global_mask is None:
        return sparse_dilated.attend(engine.pattern, call, lambda window, part: sparse_windows.attend(engine, window, part, grid_of(part)))
    assert call.global_counts is not None
    keys, queries = call.global_counts
    slots = slots_of(call.global_mask, keys)
    out = sparse_dilated.by_dilation(engine.pattern, call, lambda window, part: _of_heads(engine, window, part, slots))
    return _with_global_rows(engine, call, out, queries) if queries else out


def _of_heads(engine: WindowAndGlobals, window: Window, call: Call, slots: Tensor) -> Tensor:
    """The rows of heads of one dilation, all as if no query were global."""
    assert call.global_mask is not None
    columns = _Columns(fetched(call.k, slots), fetched(call.v, slots), call.global_mask.gather(1, slots), slots)
    near = replace(call, key_mask=~call.global_mask if call.key_mask is None else call.key_mask & ~call.global_mask)

    def attend(plain: Window, part: Call) -> Tensor:
        classes = part.k.shape[0] // call.k.shape[0]
        its_columns = columns.in_classes(classes, part.key_length) if classes > 1 else columns
        if call.query_length == 1:  # the last position, which sees every column
            its_columns = replace(columns, slots=torch.zeros_like(slots))
        return _attend(engine, plain, part, its_columns, grid_of(part))

    return sparse_dilated.of_one_dilation(window, near, attend)


def _attend(engine: WindowAndGlobals, window: Window, call: Call, columns: _Columns, grid: Grid) -> Tensor:
    """A·v for a plain window and the columns beside it."""
    if not in_cache.serves(engine, call):
        return join(_rows(engine, window, call, columns, grid), call.query_length, 2)
    assert call.key_mask is not None
    k, v = torch.cat([call.k, columns.k], 2), torch.cat([call.v, columns.v], 2)
    key_cap = in_cache.cap(torch.cat([call.key_mask, columns.real], 1), call.q)
    table = columns.slots if call.is_causal else None
    return in_cache.attend(engine, call.q, k, v, key_cap, table, partial(_pieces, window, grid, columns.k.shape[2]))


def _with_global_rows(engine: WindowAndGlobals, call: Call, out: Tensor, count: int) -> Tensor:
    """`out` with the rows of global tokens, at most `count` a sample, made anew: they see every key."""
    assert call.global_mask is not None
    mask = _of_queries(call.global_mask, call)
    rows = slots_of(mask, count)
    q, k, v = (call.q, call.k, call.v) if call.global_qkv is None else call.global_qkv
    visible_keys = None if call.key_mask is None else call.key_mask[:, None, None]
    if call.is_causal:
        past = torch.arange(call.key_length, device=q.device) <= (rows + call.offset)[:, None, :, None]
        visible_keys = past if visible_keys is None else past & visible_keys
    made = sdpa(engine, fetched(q, rows), k, v, visible_keys)
    made = torch.where(mask.gather(1, rows)[:, None, :, None], made, fetched(out, rows))
    index = rows[:, None, :, None].expand_as(made)
    return out.scatter(2, index, made) if out.requires_grad or made.requires_grad else out.scatter_(2, index, made)


@dataclass(frozen=True)
class _WithColumns:
    """`slices` with the last `count` keys, those of the global tokens, beside every part. slots: theirs, where causality hides some."""

    slices: in_cache.Slices
    count: int
    offset: int
    slots: Tensor | None
    like: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        parts, size, keys = self.slices.shape
        return parts, size, keys + self.count

    @property
    def caps(self) -> tuple[in_cache.Cap, ...]:
        if self.slots is None:
            return self.slices.caps
        parts, size, keys = self.slices.shape
        positions = self.offset + self.slices.first + torch.arange(parts * size).view(parts, size, 1)
        return (*self.slices.caps, in_cache.Cap(keys, keys + self.count, in_cache.cap(self.slots <= positions, self.like)))

    def rows(self, x: Tensor) -> Tensor:
        return self.slices.rows(x)

    def keys(self, x: Tensor, name: str, memory: in_cache.Memory) -> Tensor:
        parts, _, keys = self.shape
        fetched = memory(name, parts, keys, x.shape[1])
        fetched[:, : keys - self.count] = self.slices.keys(x, name, memory)
        fetched[:, keys - self.count :] = x[len(x) - self.count :]
        return fetched

    def add(self, gradient: Tensor, total: Tensor) -> None:
        keys = self.slices.shape[2]
        self.slices.add(gradient[:, :keys], total)
        total[len(total) - self.count :] += gradient[:, keys:].sum(0)


def _pieces(pattern: Window, grid: Grid, count: int, q: Tensor, slots: Tensor | None) -> list[list[_WithColumns]]:
    """Every head's pieces of the window with the columns; of every sample, where `slots` are given."""
    slices = sparse_windows.pieces(pattern, grid, q, count)
    of_samples = [None] if slots is None else slots.unbind()
    heads = [[_WithColumns(one, count, grid.offset, its_slots, q) for one in slices] for its_slots in of_samples]
    return [pieces for pieces in heads for _ in range(grid.heads)]


def _rows(engine: WindowAndGlobals, window: Window, call: Call, columns: _Columns, grid: Grid) -> Iterator[Tensor]:
    """The rows of every piece in order, by torch's SDPA: its keys with the columns beside them."""
    found, pieces = sparse_windows.plan(window, grid), sparse_windows.edges(window, grid)
    if found.blocks:
        before = 1 if found.start else 0
        pieces[before:before] = sparse_windows.middles(found, grid, call)
    spans = tuple((low, high) for _, _, low, high in pieces)
    queries = call.q.split([end - first for first, end, _, _ in pieces], 2)
    keys, values = sparse_windows.spans(call.k, spans), sparse_windows.spans(call.v, spans)
    for (first, end, low, high), q, k, v in zip(pieces, queries, keys, values, strict=True):
        middle = found.blocks > 0 and found.start <= first < found.stop
        size, width = (sparse_windows.BLOCK, found.slice_length) if middle else (end - first, high - low)
        yield _piece(engine, window, replace(call, q=q, k=k, v=v), columns, grid, (first, low), (size, width))


def _piece(
    engine: WindowAndGlobals, window: Window, call: Call, columns: _Columns, grid: Grid, start: tuple[int, int], shape: tuple[int, int]
) -> Tensor:
    """Consecutive rows, `size` to a part, against `width` keys each and the columns. call: its q, k and v are the piece's.
    start: the first row, and the first key. shape: size, width."""
    (first, low), (size, width), (batch, heads, rows, head_dim) = start, shape, call.q.shape
    parts, kv_heads = rows // size, call.k.shape[1]
    device = call.q.device
    positions = grid.offset + first + torch.arange(rows, device=device).view(parts, size, 1)
    slots = low + torch.arange(parts, device=device)[:, None, None] * size + torch.arange(width, device=device)
    near = sparse_windows.band(window, grid, positions[0, :, 0], slots[0, 0])  # (size, width), the same in every part
    q = call.q.reshape(batch, kv_heads, call.group, parts, size, head_dim).transpose(2, 3).flatten(3, 4)
    samples = []
    for sample in range(batch):
        k, v = (
            torch.cat([_slices(x[sample], width, size, parts), column[sample, :, None].expand(-1, parts, -1, -1)], 2)
            for x, column in ((call.k, columns.k), (call.v, columns.v))
        )
        assert call.key_mask is not None
        visible_columns = columns.real[sample].expand(parts, size, -1)
        if grid.is_causal:
            visible_columns = visible_columns & (columns.slots[sample] <= positions)
        mask = torch.cat([near & call.key_mask[sample][slots], visible_columns], 2)
        samples.append(sdpa(engine, q[sample], k, v, mask.repeat(1, call.group, 1)[None]))
    out = torch.stack(samples)  # (batch, kv_heads, parts, group · size, d)
    return out.unflatten(3, (call.group, size)).transpose(2, 3).reshape(batch, heads, rows, -1)


def _slices(x: Tensor, width: int, size: int, parts: int) -> Tensor:
    """(kv_heads, keys, d) -> (kv_heads, parts, width, d), views `size` keys apart."""
    return x[:, None] if parts == 1 else sparse_windows.slices_of(x, width)


def _reference(engine: WindowAndGlobals, call: Call) -> Tensor:
    mask, pattern = visible(call), engine.pattern.mask(grid_of(call))
    if call.global_mask is None:
        return attend_densely(engine, call, pattern if mask is None else pattern & mask)
    near = pattern | call.global_mask[:, None, None]
    out = attend_densely(engine, call, near if mask is None else near & mask)
    q, k, v = (call.q, call.k, call.v) if call.global_qkv is None else call.global_qkv
    rows = _of_queries(call.global_mask, call)[:, None, :, None]
    return torch.where(rows, attend_densely(engine, replace(call, q=q, k=k, v=v), mask), out)


def _flex_why_not(engine: WindowAndGlobals, call: Call) -> str | None:
    return sparse_flex.why_not(engine, call) if call.global_mask is None else "global tokens differ from sample to sample, which its tables do not"


WindowAndGlobals.backends = (
    Backend("blocks", _blocks, never_refuses),
    Backend("flex", sparse_flex.run, _flex_why_not),
    Backend("reference", _reference, never_refuses),
)
