"""Window attention in blocks: every block of queries reads one slice of the keys, and all slices
are views of one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import is_open
from attnzoo.engines.joining import at_a_time, join, mask_of_heads, samples_at_a_time
from attnzoo.engines.softmax import tiles
from attnzoo.engines.softmax.reference import SINK_LOGITS, SoftmaxReference
from attnzoo.engines.softmax.sdpa import attend_rows, sdpa
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window

# Queries that share a slice: larger wastes scores outside the window, smaller starves the matmuls
BLOCK = 64
LINE = 16  # a slice is a multiple of so many keys, for the sake of aligned scores
EDGE = 2 * BLOCK  # rows of an edge that share keys, where the edge is long
LONG = 8 * BLOCK  # rows from which on an edge is cut
SLICED = 2**21  # numbers in the gradient of the slices that are held at a time


@dataclass(frozen=True)
class Plan:
    """Rows [0, start) and [stop, query_length) are edges, computed densely; between them stand
    whole blocks with whole windows."""

    start: int
    stop: int
    before: int  # keys of a slice before the block's first query
    slice_length: int

    @property
    def blocks(self) -> int:
        return (self.stop - self.start) // BLOCK


def plan(pattern: Window, grid: Grid) -> Plan:
    """Where every row of a block has its whole window inside the keys."""
    after = 0 if grid.is_causal else pattern.window - 1
    before = pattern.window - 1 + -(pattern.window - 1 + BLOCK + after) % LINE
    start = min(max(0, before - grid.offset), grid.query_length)
    end = min(grid.query_length, grid.key_length - after - grid.offset)
    blocks = max(0, end - start) // BLOCK
    return Plan(start, start + blocks * BLOCK, before, before + BLOCK + after)


def edges(pattern: Window, grid: Grid) -> list[tuple[int, int, int, int]]:
    """Dense pieces as (first row, end row, first key, end key). A long edge is cut, lest it be a
    rectangle around little more than a triangle."""
    found = plan(pattern, grid)
    ends = (
        [(0, found.start), (found.stop, grid.query_length)]
        if found.blocks
        else [(0, grid.query_length)]
    )
    spans = [span for first, end in ends for span in _cut(first, end)]
    after = 1 if grid.is_causal else pattern.window
    pieces = []
    for first, end in spans:
        low = max(0, grid.offset + first - pattern.window + 1)
        high = min(grid.key_length, grid.offset + end - 1 + after)
        if first < end:
            pieces.append((first, end, low, max(low, high)))
    return pieces


def _cut(first: int, end: int) -> Iterator[tuple[int, int]]:
    rows = EDGE if end - first >= LONG else max(1, end - first)
    for start in range(first, end, rows):
        yield start, min(start + rows, end)


def count_pairs(pattern: Window, grid: Grid) -> int:
    """(query, key) pairs of one head that are computed."""
    found = plan(pattern, grid)
    return found.blocks * BLOCK * found.slice_length + sum(
        (end - first) * (high - low) for first, end, low, high in edges(pattern, grid)
    )


def in_tiles(engine: SoftmaxReference, pattern: Window, call: Call) -> Tensor:
    """A·v for a plain window, in the memory of `tiles`. The call may have sink logits."""
    grid, frame = grid_of(call), call.frame()  # what `compute` holds is freed late
    key_cap = None if call.key_mask is None else tiles.cap(call.key_mask, call.q)

    def compute(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        return in_slices(engine, pattern, with_logits(frame(q, k, v), logits))

    def of_heads(q: Tensor, _: Tensor | None) -> list[list[tiles.Slices]]:
        return [pieces(pattern, grid, q)] * grid.heads

    return tiles.attend(
        engine, call.q, call.k, call.v, key_cap, None, of_heads, compute, call.get("sink_logits")
    )


def in_slices(engine: SoftmaxReference, pattern: Window, call: Call) -> Tensor:
    """A·v for a plain window by SDPA: the first edge, the whole blocks, the last edge."""
    grid = grid_of(call)
    found, dense = plan(pattern, grid), edges(pattern, grid)
    if found.blocks:
        dense = sorted([*dense, *middles(found, grid, call)])
    queries = call.q.split([end - first for first, end, _, _ in dense], 2)
    ends = tuple((low, high) for _, _, low, high in dense)
    keys, values = spans(call.k, ends), spans(call.v, ends)

    def rows() -> Iterator[Tensor]:
        for piece, q, k, v in zip(dense, queries, keys, values, strict=True):
            middle = found.blocks > 0 and found.start <= piece[0] < found.stop
            part = replace(call, q=q, k=k, v=v)
            if middle:
                yield _middle(engine, pattern, part, grid, piece[2])
            else:
                yield _edge(engine, pattern, part, grid, piece)

    return join(rows(), call.query_length, 2)


def pieces(pattern: Window, grid: Grid, q: Tensor, more: int = 0) -> list[tiles.Slices]:
    """One head's: the edges, some rows at a time, and the whole blocks, some blocks at a time.
    more: keys that each row will get beside these."""
    found, slices, offset = plan(pattern, grid), [], grid.offset
    for first, end, low, high in edges(pattern, grid):
        rows = max(BLOCK, tiles.SCORES // max(1, high - low + more))
        for start in range(first, end, rows):
            stop = min(start + rows, end)
            caps = _caps(pattern, grid, (offset + start, offset + stop), (low, high), q)
            slices.append(tiles.Slices(start, (1, stop - start, high - low), low, caps))
    caps = _caps(pattern, grid, (found.before, found.before + BLOCK), (0, found.slice_length), q)
    together = tiles.parts_at_a_time(BLOCK, found.slice_length + more)
    for block in range(0, found.blocks, together):
        first, blocks = found.start + block * BLOCK, min(together, found.blocks - block)
        slices.append(
            tiles.Slices(
                first, (blocks, BLOCK, found.slice_length), offset + first - found.before, caps
            )
        )
    return slices


def _caps(
    pattern: Window, grid: Grid, rows: tuple[int, int], keys: tuple[int, int], like: Tensor
) -> tuple[tiles.Cap, ...]:
    """What hides keys from rows, both given as positions from..to; the keys in the middle, which
    every row sees, need nothing."""
    low, high = keys
    seen_from, seen_to = (
        rows[1] - pattern.window,
        rows[0] + (1 if grid.is_causal else pattern.window),
    )
    spans = (
        [(low, min(seen_from, high)), (max(seen_to, low), high)]
        if seen_from < seen_to
        else [(low, high)]
    )
    bands = [
        (a - low, b - low, band(pattern, grid, torch.arange(*rows), torch.arange(a, b)))
        for a, b in spans
        if a < b
    ]
    return tuple(tiles.Cap(a, b, tiles.cap(band, like)) for a, b, band in bands)


def middles(found: Plan, grid: Grid, call: Call) -> list[tuple[int, int, int, int]]:
    """The whole blocks, some at a time: the gradients of their slices are several times longer than
    the keys."""
    sliced = call.k.shape[0] * call.k.shape[1] * found.slice_length * call.k.shape[3]
    together = (
        at_a_time(found.blocks, sliced, SLICED, call.k) if torch.is_grad_enabled() else found.blocks
    )
    pieces = []
    for first in range(found.start, found.stop, together * BLOCK):
        end, low = min(first + together * BLOCK, found.stop), grid.offset + first - found.before
        pieces.append((first, end, low, low + end - first - BLOCK + found.slice_length))
    return pieces


def _edge(
    engine: SoftmaxReference,
    pattern: Window,
    call: Call,
    grid: Grid,
    piece: tuple[int, int, int, int],
) -> Tensor:
    """Rows first..end over keys low..high, densely. call: its q, k and v are theirs."""
    first, end, low, high = piece
    q, k, v, logits = call.q, call.k, call.v, call.get("sink_logits")
    if low == high:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    key_mask = None if call.key_mask is None else call.key_mask[:, None, None, low:high]
    seen_by_first = grid.offset + first + (1 if grid.is_causal else pattern.window) >= high
    seen_by_last = grid.offset + end - 1 - pattern.window < low
    if seen_by_first and seen_by_last:
        return attend_rows(engine, q, k, v, key_mask, logits)
    square = grid.offset + first == low and end - first == high - low
    if grid.is_causal and square and seen_by_last and key_mask is None and logits is None:
        return sdpa(engine, q, k, v, is_causal=True)
    mask = band(
        pattern,
        grid,
        torch.arange(grid.offset + first, grid.offset + end, device=q.device),
        torch.arange(low, high, device=q.device),
    )
    mask = mask[None, None] if key_mask is None else mask & key_mask
    return attend_rows(engine, q, k, v, mask, logits)


def band(pattern: Window, grid: Grid, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Which of these keys the window shows to each of these queries, (queries, keys) bool."""
    distance = query_positions[:, None] - key_positions
    return (
        (distance.abs() < pattern.window) & (distance >= 0)
        if grid.is_causal
        else distance.abs() < pattern.window
    )


def _middle(engine: SoftmaxReference, pattern: Window, call: Call, grid: Grid, low: int) -> Tensor:
    """Whole blocks, one SDPA call: batch × kv_heads, blocks, (group × block) rows against one slice
    each of the keys from `low` on. call: its q, k and v are theirs."""
    found, q, k, v = plan(pattern, grid), call.q, call.k, call.v
    near = band(
        pattern,
        grid,
        torch.arange(BLOCK, device=q.device) + found.before,
        torch.arange(found.slice_length, device=q.device),
    )
    near = near.repeat(call.group, 1)[None, None]
    if call.key_mask is None:
        return _slices(engine, call, near, found.slice_length)
    own = call.key_mask[:, low : low + k.shape[2]]
    masks = own.unfold(1, found.slice_length, BLOCK)[:, :, None]  # (batch, blocks, 1, slice)
    outs = []
    for some in samples_at_a_time(q.shape[0]):
        mask = mask_of_heads(near & masks[some], k.shape[1])
        part = replace(call, q=q[some], k=k[some], v=v[some])
        outs.append(_slices(engine, part, mask, found.slice_length))
    return torch.cat(outs)


def _slices(engine: SoftmaxReference, call: Call, mask: Tensor, slice_length: int) -> Tensor:
    batch, heads, rows, head_dim = call.q.shape
    kv_heads, group = call.k.shape[1], call.group
    q = call.q.reshape(batch * kv_heads, group, -1, BLOCK, head_dim).transpose(1, 2).flatten(2, 3)
    k, v = (slices_of(x.flatten(0, 1), slice_length) for x in (call.k, call.v))
    logits = logits_of_rows(call, BLOCK)
    out = attend_rows(engine, q, k, v, mask, logits, every_row_sees=call.key_mask is None)
    out = out.unflatten(2, (group, BLOCK)).transpose(1, 2)
    return out.reshape(batch, heads, rows, call.v.shape[3])


def with_logits(call: Call, logits: Tensor | None) -> Call:
    """The call with these sink logits, where there are some."""
    return call if logits is None else call.giving(SINK_LOGITS, logits)


def logits_of_rows(call: Call, size: int) -> Tensor | None:
    """The call's sink logits for `size` rows of every head that shares a key head,
    (batch · kv_heads, 1, group · size, 1)."""
    logits = call.get("sink_logits")
    if logits is None:
        return None
    of_rows = logits.view(-1, call.group).repeat_interleave(size, 1)
    return of_rows[:, None, :, None].repeat(call.q.shape[0], 1, 1, 1)


def spans(x: Tensor, ends: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """x[:, :, low:high] for each (low, high)."""
    if len(ends) > 1 and x.requires_grad and torch.is_grad_enabled() and not _must_be_plain():
        return _Spans.apply(x, ends)
    return tuple(x[:, :, low:high] for low, high in ends)


def slices_of(x: Tensor, slice_length: int) -> Tensor:
    """(batch, length, d) -> (batch, blocks, slice_length, d): the keys of every block of queries,
    as views."""
    return _sliced(x, slice_length) if _must_be_plain() else _Slices.apply(x, slice_length)


def _must_be_plain() -> bool:
    """Whether views have autograd's own backward pass: where it is differentiated again, and in a
    trace, which cannot hold another."""
    return is_open() or torch.jit.is_tracing()


def _sliced(x: Tensor, slice_length: int) -> Tensor:
    return x.unfold(1, slice_length, BLOCK).mT


class _Spans(torch.autograd.Function):
    """Overlapping spans of the length as views. autograd's own backward makes a gradient as long as
    the sequence for every span."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, spans: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        return tuple(x[:, :, low:high] for low, high in spans)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, tuple[tuple[int, int], ...]], output: tuple[Tensor, ...]
    ) -> None:
        ctx.shape, ctx.spans = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (low, high), gradient in zip(ctx.spans, gradients, strict=True):
            total[:, :, low:high] += gradient
        return total, None


class _Slices(torch.autograd.Function):
    """Overlapping slices of the length as views, (batch, length, d) -> (batch, blocks,
    slice_length, d).

    autograd's own backward of such a view scatters element by element; adding block-wide pieces is
    two times faster.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slice_length: int) -> Tensor:
        return _sliced(x, slice_length)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.length, ctx.slice_length = inputs[0].shape[1], inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        batch, blocks, slice_length, width = gradient.shape
        pieces = -(-slice_length // BLOCK)
        total = gradient.new_zeros(batch, (blocks + pieces - 1) * BLOCK, width)
        for piece in range(pieces):
            part = gradient[:, :, piece * BLOCK : (piece + 1) * BLOCK]
            target = total[:, piece * BLOCK : (piece + blocks) * BLOCK].unflatten(
                1, (blocks, BLOCK)
            )
            target[:, :, : part.shape[2]] += part
        return total[:, : ctx.length], None
