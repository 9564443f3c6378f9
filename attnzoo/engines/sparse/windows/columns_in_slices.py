"""Backend `columns`: a window by SDPA on slices of the keys, with the columns beside each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.piece_by_piece import join, mask_of_heads, samples_at_a_time
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.rows import attend_rows
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows.columns import Columns
from attnzoo.engines.sparse.windows.overlapping_views import slices_of
from attnzoo.engines.sparse.windows.window_plan import BLOCK, Rectangle, band, plan
from attnzoo.engines.sparse.windows.window_slices import bias_of_slices, cut, logits_of_rows


def in_slices(engine: SoftmaxReference, pattern: Window, call: Call, columns: Columns) -> Tensor:
    """A·v for a plain window and columns, by torch's SDPA on slices of the keys with the columns
    beside them; arguments as `columns_in_tiles.in_tiles`."""
    grid = grid_of(call)
    return join(_rows(engine, pattern, call, columns, grid), call.query_length, 2)


def _rows(
    engine: SoftmaxReference, pattern: Window, call: Call, columns: Columns, grid: Grid
) -> Iterator[Tensor]:
    """All rows in order, by torch's SDPA over their keys and the columns: whole blocks of rows, and
    the rows at both ends whose window does not lie inside the keys (see `window_plan`)."""
    found = plan(pattern, grid)
    for rectangle, part in cut(pattern, grid, call):
        first, end, low, high = rectangle
        shape = (BLOCK, found.slice_length) if found.has(rectangle) else (end - first, high - low)
        yield _beside_columns(engine, pattern, part, columns, grid, rectangle, shape)


def _beside_columns(
    engine: SoftmaxReference,
    pattern: Window,
    call: Call,
    columns: Columns,
    grid: Grid,
    rectangle: Rectangle,
    shape: tuple[int, int],
) -> Tensor:
    """A·v of consecutive rows in parts, each part against its own keys and the columns.

    engine: gives scale and dropout
    pattern: a window without dilation
    call: its q, k and v are those of the rows, its key_mask is of all keys
    columns: the keys that every row sees besides
    grid: the sizes of the whole call
    rectangle: where the rows and their keys stand
    shape: rows and keys of a part; the keys of the next part begin as many keys later as a part has
        rows

    Returns (batch, heads, rows, value_dim).
    """
    (size, width), (batch, heads, rows, head_dim) = shape, call.q.shape
    parts, kv_heads = rows // size, call.k.shape[1]
    q = call.q.reshape(batch, kv_heads, call.group, parts, size, head_dim)
    q = q.transpose(2, 3).flatten(3, 4)
    seen = partial(_seen, pattern, call.key_mask, columns, grid, rectangle, (parts, *shape))
    outs = []
    for some in samples_at_a_time(batch):
        k, v = (
            torch.cat(
                [
                    _slices(x[some].flatten(0, 1), width, size, parts),
                    column[some].flatten(0, 1)[:, None].expand(-1, parts, -1, -1),
                ],
                2,
            )
            for x, column in ((call.k, columns.k), (call.v, columns.v))
        )
        mask = mask_of_heads(seen(some).repeat(1, 1, call.group, 1), kv_heads)
        logits = logits_of_rows(replace(call, q=call.q[some]), size)
        bias = _bias_beside(replace(call, q=call.q[some]), columns, grid, rectangle, shape, some)
        outs.append(attend_rows(engine, q[some].flatten(0, 1), k, v, mask, logits, bias))
    out = torch.cat(outs).unflatten(0, (-1, kv_heads))  # (batch, kv_heads, parts, group · size, d)
    return out.unflatten(3, (call.group, size)).transpose(2, 3).reshape(batch, heads, rows, -1)


def _bias_beside(
    call: Call,
    columns: Columns,
    grid: Grid,
    rectangle: Rectangle,
    shape: tuple[int, int],
    some: slice,
) -> Tensor | None:
    """What distances add to the scores of the rows, (samples · kv_heads, parts, group · size,
    width + count); None where the call has no bias. Arguments as in `_beside_columns` and
    `_seen`."""
    (size, width), (first, end, low, _) = shape, rectangle
    near = bias_of_slices(call, size, width, grid.offset + first - low)
    if near is None or columns.bias is None:
        return None
    beside = columns.bias[some if len(columns.bias) > 1 else slice(None), :, first:end]
    beside = beside.unflatten(1, (-1, call.group)).unflatten(3, (-1, size)).transpose(2, 3)
    beside = beside.flatten(3, 4).expand(len(call.q), -1, -1, -1, -1).flatten(0, 1)
    return torch.cat([near.expand(-1, beside.shape[1], -1, -1), beside], 3)


def _seen(
    pattern: Window,
    key_mask: Tensor | None,
    columns: Columns,
    grid: Grid,
    rectangle: Rectangle,
    shape: tuple[int, int, int],
    some: slice,
) -> Tensor:
    """Which of their keys and of the columns some rows see.

    pattern, columns, grid, rectangle: as in `_beside_columns`
    key_mask: (batch, key_length) bool, False in hidden slots; None: none is hidden
    shape: number of parts, rows of each part, keys of each part
    some: which samples

    Returns (samples, parts, rows, keys + columns) bool.
    """
    (parts, size, width), device = shape, columns.slots.device
    rows = torch.arange(parts * size, device=device).view(parts, size, 1)
    positions = grid.offset + rectangle.first + rows
    starts = torch.arange(parts, device=device)[:, None, None] * size
    slots = rectangle.low + starts + torch.arange(width, device=device)
    near = band(pattern, grid, positions[0, :, 0], slots[0, 0])  # (size, width), as in every part
    real = columns.real[some]
    seen = (
        near.expand(real.shape[0], parts, -1, -1)
        if key_mask is None
        else near & key_mask[some][:, slots]
    )
    seen_columns = real[:, None, None].expand(-1, parts, size, -1)
    if grid.is_causal:
        seen_columns = seen_columns & (columns.slots[some][:, None, None] <= positions)
    return torch.cat([seen, seen_columns], 3)


def _slices(x: Tensor, width: int, size: int, parts: int) -> Tensor:
    """The keys of every part, as views that begin `size` keys apart: (heads, keys, d) -> (heads,
    parts, width, d)."""
    return x[:, None] if parts == 1 else slices_of(x, width)
