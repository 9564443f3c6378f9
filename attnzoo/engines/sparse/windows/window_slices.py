"""Backend `windows`: every block of queries reads one slice of the keys by SDPA. All slices are
views of one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.piece_by_piece import at_a_time, join, mask_of_heads, samples_at_a_time
from attnzoo.engines.softmax.distance_bias import bias_between
from attnzoo.engines.softmax.reference import (
    SINK_LOGITS,
    SoftmaxReference,
    segments_of_queries,
)
from attnzoo.engines.softmax.rows import attend_rows
from attnzoo.engines.softmax.sdpa import sdpa
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows.overlapping_views import slices_of, spans_of
from attnzoo.engines.sparse.windows.window_plan import BLOCK, Plan, Rectangle, band, edges, plan

SLICED = 2**21  # numbers in the gradient of the slices that are held at a time


def in_slices(engine: SoftmaxReference, pattern: Window, call: Call) -> Tensor:
    """A·v for a plain window, by SDPA: the first edge, the whole blocks, the last edge.

    engine: gives scale, dropout and softcap
    pattern: a window without dilation
    call: the whole call, which may have sink logits

    Returns (batch, heads, query_length, value_dim).
    """
    grid = grid_of(call)
    found = plan(pattern, grid)
    ids = None if call.segments is None else segments_of_queries(call)

    def rows() -> Iterator[Tensor]:
        for rectangle, part in cut(pattern, grid, call):
            if found.has(rectangle):
                yield _middle(engine, pattern, part, grid, rectangle, ids)
            else:
                yield _edge(engine, pattern, part, grid, rectangle, ids)

    return join(rows(), call.query_length, 2)


def cut(pattern: Window, grid: Grid, call: Call) -> Iterator[tuple[Rectangle, Call]]:
    """The edges and the whole blocks of a call in the order of their rows.

    pattern: a window without dilation
    grid: the sizes of the call
    call: the whole call

    Yields where the rows and their keys stand, and the call with their q, k and v alone; its
    key_mask and segments stay those of all keys.
    """
    found, rectangles = plan(pattern, grid), edges(pattern, grid)
    if found.blocks:
        rectangles = sorted([*rectangles, *_middles(found, grid, call)])
    ends = tuple((one.low, one.high) for one in rectangles)
    queries = call.q.split([one.end - one.first for one in rectangles], 2)
    parts = zip(rectangles, queries, spans_of(call.k, ends), spans_of(call.v, ends), strict=True)
    for rectangle, q, k, v in parts:
        yield rectangle, replace(call, q=q, k=k, v=v)


def _middles(found: Plan, grid: Grid, call: Call) -> list[Rectangle]:
    """The whole blocks. With gradients they come some at a time, since those of their slices are
    several times longer than the keys."""
    sliced = call.k.shape[0] * call.k.shape[1] * found.slice_length * call.k.shape[3]
    together = (
        at_a_time(found.blocks, sliced, SLICED, call.k) if torch.is_grad_enabled() else found.blocks
    )
    rectangles = []
    for first in range(found.start, found.stop, together * BLOCK):
        end, low = min(first + together * BLOCK, found.stop), grid.offset + first - found.before
        high = low + end - first - BLOCK + found.slice_length
        rectangles.append(Rectangle(first, end, low, high))
    return rectangles


def _edge(
    engine: SoftmaxReference,
    pattern: Window,
    call: Call,
    grid: Grid,
    rectangle: Rectangle,
    ids: Tensor | None,
) -> Tensor:
    """The rows of an edge over all its keys.

    call: its q, k and v are those of the edge, its key_mask and segments are of all keys
    ids: segments of all queries, (batch, query_length)
    """
    first, end, low, high = rectangle
    q, k, v, logits = call.q, call.k, call.v, call.get("sink_logits")
    if low == high:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    positions = torch.arange(grid.offset + first, grid.offset + end, device=q.device)
    keys = torch.arange(low, high, device=q.device)
    bias = call.get("distance_bias")
    bias = None if bias is None else bias_between(bias, positions[:, None], keys)[None]
    key_mask = None if call.key_mask is None else call.key_mask[:, None, None, low:high]
    if ids is not None and call.segments is not None:
        same = ids[:, None, first:end, None] == call.segments[:, None, None, low:high]
        key_mask = same if key_mask is None else same & key_mask
    seen_by_first = grid.offset + first + (1 if grid.is_causal else pattern.window) >= high
    seen_by_last = grid.offset + end - 1 - pattern.window < low
    if seen_by_first and seen_by_last:
        return attend_rows(engine, q, k, v, key_mask, logits, bias)
    square = grid.offset + first == low and end - first == high - low
    plain = key_mask is None and logits is None and bias is None and engine.softcap is None
    if grid.is_causal and square and seen_by_last and plain:
        return sdpa(engine, q, k, v, is_causal=True)
    mask = band(pattern, grid, positions, keys)
    mask = mask[None, None] if key_mask is None else mask & key_mask
    return attend_rows(engine, q, k, v, mask, logits, bias)


def _middle(
    engine: SoftmaxReference,
    pattern: Window,
    call: Call,
    grid: Grid,
    rectangle: Rectangle,
    ids: Tensor | None,
) -> Tensor:
    """Consecutive whole blocks by one SDPA call: (batch · kv_heads, blocks, group · BLOCK, d)
    against a slice of the keys each.

    call: its q, k and v are those of the blocks, its key_mask and segments are of all keys
    ids: segments of all queries, (batch, query_length)
    """
    found, q, k, v = plan(pattern, grid), call.q, call.k, call.v
    rows = torch.arange(BLOCK, device=q.device) + found.before
    near = band(pattern, grid, rows, torch.arange(found.slice_length, device=q.device))
    near = near.repeat(call.group, 1)[None, None]
    masks = _shown(call, rectangle, found.slice_length, ids)
    if masks is None:
        return _slices(engine, call, near, found)
    if masks.shape[2] > 1:
        masks = masks.repeat(1, 1, call.group, 1)
    outs = []
    for some in samples_at_a_time(q.shape[0]):
        mask = mask_of_heads(near & masks[some], k.shape[1])
        part = replace(call, q=q[some], k=k[some], v=v[some])
        outs.append(_slices(engine, part, mask, found))
    return torch.cat(outs)


def _shown(
    call: Call, rectangle: Rectangle, slice_length: int, ids: Tensor | None
) -> Tensor | None:
    """What padding and pieces show of every slice, (batch, blocks, 1 or BLOCK, slice_length); None
    where they hide nothing. Arguments as in `_middle`."""
    first, end, low, high = rectangle

    def of_slices(x: Tensor) -> Tensor:
        return x[:, low:high].unfold(1, slice_length, BLOCK)[:, :, None]

    masks = None if call.key_mask is None else of_slices(call.key_mask)
    if ids is not None and call.segments is not None:
        same = ids[:, first:end].unflatten(1, (-1, BLOCK))[..., None] == of_slices(call.segments)
        masks = same if masks is None else same & masks
    return masks


def _slices(engine: SoftmaxReference, call: Call, mask: Tensor, found: Plan) -> Tensor:
    """A·v of whole blocks, (batch, heads, blocks · BLOCK, value_dim).

    call: its q, k and v are those of the blocks
    mask: bool, broadcastable to (batch · kv_heads, blocks, group · BLOCK, slice_length)
    found: the plan of the whole call
    """
    batch, heads, rows, head_dim = call.q.shape
    kv_heads, group = call.k.shape[1], call.group
    q = call.q.reshape(batch * kv_heads, group, -1, BLOCK, head_dim).transpose(1, 2).flatten(2, 3)
    k, v = (slices_of(x.flatten(0, 1), found.slice_length) for x in (call.k, call.v))
    logits, every_row_sees = logits_of_rows(call, BLOCK), call.key_mask is None
    bias = bias_of_slices(call, BLOCK, found.slice_length, found.before)
    out = attend_rows(engine, q, k, v, mask, logits, bias, every_row_sees=every_row_sees)
    out = out.unflatten(2, (group, BLOCK)).transpose(1, 2)
    return out.reshape(batch, heads, rows, call.v.shape[3])


def bias_of_slices(call: Call, size: int, slice_length: int, before: int) -> Tensor | None:
    """What the call's distances add to the scores of a block of rows over its slice of the keys.

    size: rows of the block
    slice_length: keys of the slice
    before: how many of these stand before the block's first row

    Returns (batch · kv_heads, 1, group · size, slice_length), the heads of a group one after the
    other; None where the call has no distance_bias.
    """
    bias = call.get("distance_bias")
    if bias is None:
        return None
    rows = torch.arange(size, device=bias.device)[:, None] + before
    of_heads = bias_between(bias, rows, torch.arange(slice_length, device=bias.device))
    of_heads = of_heads.unflatten(0, (-1, call.group)).flatten(1, 2)[:, None]
    return of_heads.repeat(call.q.shape[0], 1, 1, 1)


def with_logits(call: Call, logits: Tensor | None) -> Call:
    """The call with these sink logits, where there are some."""
    return call if logits is None else call.giving(SINK_LOGITS, logits)


def logits_of_rows(call: Call, size: int) -> Tensor | None:
    """The call's sink logits for `size` rows of every head that shares a key head.

    Returns (batch · kv_heads, 1, group · size, 1), the heads of a group one after the other; None
    where the call has no sink logits.
    """
    logits = call.get("sink_logits")
    if logits is None:
        return None
    of_rows = logits.view(-1, call.group).repeat_interleave(size, 1)
    return of_rows[:, None, :, None].repeat(call.q.shape[0], 1, 1, 1)
