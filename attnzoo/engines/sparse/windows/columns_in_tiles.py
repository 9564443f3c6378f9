"""Backend `tiles` of a window with columns: in each piece, the columns stand behind the keys of
every part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles import tiles
from attnzoo.engines.softmax.tiles.tile_pieces import Cap, InPieces, Memory, Slices, Way, cap
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows.columns import Columns
from attnzoo.engines.sparse.windows.columns_in_slices import in_slices
from attnzoo.engines.sparse.windows.window_slices import with_logits
from attnzoo.engines.sparse.windows.window_tiles import pieces_of_head


def in_tiles(
    engine: SoftmaxReference,
    pattern: Window,
    call: Call,
    columns: Columns,
    way: Way = tiles.IN_CACHE,
) -> Tensor:
    """A·v for a plain window and columns by `tiles`, a few rows at a time on the CPU.

    engine: gives scale and dropout
    pattern: a window without dilation
    call: its key_mask hides the columns from the window
    columns: the keys that every row sees besides
    way: how pieces are computed

    Returns (batch, heads, query_length, value_dim).
    """
    grid, key_mask, lengths = grid_of(call), call.key_mask, [call.key_length, columns.count]
    real, slots = columns.real, columns.slots
    assert key_mask is not None
    k, v = torch.cat([call.k, columns.k], 2), torch.cat([call.v, columns.v], 2)
    whole_mask = torch.cat([key_mask, real], 1)
    table = slots if grid.is_causal else None

    frame = call.frame()

    def compute(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        (k, its_k), (v, its_v) = (x.split(lengths, 2) for x in (k, v))
        near = with_logits(frame(q, k, v), logits)
        return in_slices(engine, pattern, near, Columns(its_k, its_v, real, slots))

    of_heads = partial(_pieces, pattern, grid, columns.count, way)
    logits = call.get("sink_logits")
    return way.attend(engine, InPieces(call.q, k, v, of_heads, compute, whole_mask, table, logits))


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
    def first(self) -> int:
        return self.slices.first

    @property
    def caps(self) -> tuple[Cap, ...]:
        if self.slots is None:
            return self.slices.caps
        parts, size, keys = self.slices.shape
        positions = (
            self.offset
            + self.slices.first
            + torch.arange(parts * size, device="cpu").view(parts, size, 1)
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

    def runs(self, key_length: int) -> Tensor:
        columns = torch.tensor([key_length - self.count, self.count], device="cpu")
        return torch.cat([self.slices.runs(key_length), columns.expand(self.shape[0], 1, 2)], 1)

    def add(self, gradient: Tensor, total: Tensor) -> None:
        keys = self.slices.shape[2]
        self.slices.add(gradient[:, :keys], total)
        total[len(total) - self.count :] += gradient[:, keys:].sum(0)

    def add_bias(self, bias: Tensor, scores: Tensor) -> None:
        raise NotImplementedError  # the backend refuses it


def _pieces(
    pattern: Window, grid: Grid, count: int, way: Way, q: Tensor, slots: Tensor | None
) -> list[list[_WithColumns]]:
    """The pieces of the window with the columns, for every head, or for every sample and head where
    `slots` is given.

    pattern: a window without dilation
    grid: the sizes of the call
    count: number of columns
    way: how pieces are computed
    q: (batch, heads, query_length, head_dim)
    slots: (batch, count), where the columns stand; None in a call that is not causal
    """
    slices = pieces_of_head(q, pattern, grid, way, count)
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
