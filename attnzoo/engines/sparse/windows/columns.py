"""A window and, beside it, columns: a few keys that every row sees, wherever it stands.

Rows of a window are computed in parts, each with a slice of consecutive keys. The columns are laid
beside every slice, so that one softmax goes over both; in the slice itself they are hidden, so that
a key counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.piece_by_piece import join, mask_of_heads, samples_at_a_time
from attnzoo.engines.softmax import tiles
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.sdpa import attend_rows
from attnzoo.engines.softmax.tile_pieces import Cap, Memory, Slices, cap
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows import dilated
from attnzoo.engines.sparse.windows.overlapping_views import slices_of
from attnzoo.engines.sparse.windows.window_plan import BLOCK, Rectangle, band, plan
from attnzoo.engines.sparse.windows.window_slices import cut, logits_of_rows, with_logits
from attnzoo.engines.sparse.windows.window_tiles import pieces_of_head


@dataclass(frozen=True)
class Columns:
    """Keys that every row sees, as far as causality allows.

    k, v: (batch, kv_heads, count, head_dim or value_dim)
    real: (batch, count) bool, False where a sample has fewer than count
    slots: (batch, count), where they stand among the keys of the call
    """

    k: Tensor
    v: Tensor
    real: Tensor
    slots: Tensor

    @property
    def count(self) -> int:
        return self.k.shape[2]

    def in_classes(self, dilation: int, places: int) -> Columns:
        """The columns of a call whose positions are folded into the batch, as `dilated.Fold` does:
        positions with the same remainder modulo the dilation form a class.

        Every class gets every column. Its slot becomes the place in the class from which on
        causality must show the column, so that the same rows see it as before.

        dilation: number of classes
        places: number of keys of a class
        """
        k, v, real = (x.repeat_interleave(dilation, 0) for x in (self.k, self.v, self.real))
        classes = torch.arange(dilation, device=k.device)[:, None]
        # Position / dilation, rounded up, is looked up: a division would be counted as arithmetic.
        rounded_up = torch.arange(places + 1, device=k.device).repeat_interleave(dilation)
        return Columns(
            k, v, real, rounded_up[self.slots[:, None] - classes + dilation - 1].flatten(0, 1)
        )


AttendColumns = Callable[[SoftmaxReference, Window, Call, Columns], Tensor]


def attend_dilated(
    engine: SoftmaxReference, window: Window, call: Call, columns: Columns, attend: AttendColumns
) -> Tensor:
    """A·v for a window with one dilation for all heads, by a function that takes a plain window.

    engine: gives scale and dropout
    window: its dilation is one number
    call: the whole call; its key_mask hides the columns from the window
    columns: the keys that every row sees besides
    attend: computes A·v under a plain window and columns

    Returns (batch, heads, query_length, value_dim).
    """

    def attend_plain(plain: Window, part: Call) -> Tensor:
        its_columns = columns
        if window.dilation != 1:
            if call.query_length == 1:  # the last position, which sees every column
                its_columns = replace(columns, slots=torch.zeros_like(columns.slots))
            else:
                classes = part.k.shape[0] // call.k.shape[0]
                its_columns = columns.in_classes(classes, part.key_length)
        return attend(engine, plain, part, its_columns)

    return dilated.of_one_dilation(window, call, attend_plain)


def in_tiles(engine: SoftmaxReference, pattern: Window, call: Call, columns: Columns) -> Tensor:
    """A·v for a plain window and columns by `tiles`, a few rows at a time on the CPU.

    engine: gives scale and dropout
    pattern: a window without dilation
    call: its key_mask hides the columns from the window
    columns: the keys that every row sees besides

    Returns (batch, heads, query_length, value_dim).
    """
    grid, key_mask, lengths = grid_of(call), call.key_mask, [call.key_length, columns.count]
    real, slots = columns.real, columns.slots
    assert key_mask is not None
    k, v = torch.cat([call.k, columns.k], 2), torch.cat([call.v, columns.v], 2)
    key_cap = cap(torch.cat([key_mask, real], 1), call.q)
    table = slots if grid.is_causal else None

    frame = call.frame()

    def compute(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        (k, its_k), (v, its_v) = (x.split(lengths, 2) for x in (k, v))
        near = with_logits(frame(q, k, v), logits)
        return in_slices(engine, pattern, near, Columns(its_k, its_v, real, slots))

    of_heads = partial(_pieces, pattern, grid, columns.count)
    logits = call.get("sink_logits")
    return tiles.attend(engine, call.q, k, v, key_cap, table, of_heads, compute, logits)


def in_slices(engine: SoftmaxReference, pattern: Window, call: Call, columns: Columns) -> Tensor:
    """As `in_tiles`, by torch's SDPA on slices of the keys with the columns beside them."""
    grid = grid_of(call)
    return join(_rows(engine, pattern, call, columns, grid), call.query_length, 2)


@dataclass(frozen=True)
class _WithColumns:
    """A piece (`tile_pieces.Piece`) of the window with the columns beside every part. The columns
    are the last `count` keys of the tensors that it is given.

    slices: the piece of the window alone
    count: number of columns
    offset: position of the first query
    slots: (count,), where the columns stand; None where causality hides none of them from any row
    like: a tensor of the dtype that caps have
    """

    slices: Slices
    count: int
    offset: int
    slots: Tensor | None
    like: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        parts, size, keys = self.slices.shape
        return parts, size, keys + self.count

    @property
    def caps(self) -> tuple[Cap, ...]:
        if self.slots is None:
            return self.slices.caps
        parts, size, keys = self.slices.shape
        positions = (
            self.offset + self.slices.first + torch.arange(parts * size).view(parts, size, 1)
        )
        return (
            *self.slices.caps,
            Cap(keys, keys + self.count, cap(self.slots <= positions, self.like)),
        )

    def rows(self, x: Tensor) -> Tensor:
        return self.slices.rows(x)

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        parts, _, keys = self.shape
        fetched = memory(name, parts, keys, x.shape[1])
        fetched[:, : keys - self.count] = self.slices.keys(x, name, memory)
        fetched[:, keys - self.count :] = x[len(x) - self.count :]
        return fetched

    def add(self, gradient: Tensor, total: Tensor) -> None:
        keys = self.slices.shape[2]
        self.slices.add(gradient[:, :keys], total)
        total[len(total) - self.count :] += gradient[:, keys:].sum(0)


def _pieces(
    pattern: Window, grid: Grid, count: int, q: Tensor, slots: Tensor | None
) -> list[list[_WithColumns]]:
    """The pieces of the window with the columns, for every head, or for every sample and head where
    `slots` is given.

    pattern: a window without dilation
    grid: the sizes of the call
    count: number of columns
    q: (batch, heads, query_length, head_dim)
    slots: (batch, count), where the columns stand; None in a call that is not causal
    """
    slices = pieces_of_head(pattern, grid, q, count)
    of_samples = [None] if slots is None else slots.unbind()
    heads = []
    for its_slots in of_samples:
        last = -1 if its_slots is None else int(its_slots.max())
        seen = [its_slots if grid.offset + one.first < last else None for one in slices]
        heads.append(
            [
                _WithColumns(one, count, grid.offset, hidden, q)
                for one, hidden in zip(slices, seen, strict=True)
            ]
        )
    return [pieces for pieces in heads for _ in range(grid.heads)]


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
        outs.append(attend_rows(engine, q[some].flatten(0, 1), k, v, mask, logits))
    out = torch.cat(outs).unflatten(0, (-1, kv_heads))  # (batch, kv_heads, parts, group · size, d)
    return out.unflatten(3, (call.group, size)).transpose(2, 3).reshape(batch, heads, rows, -1)


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
