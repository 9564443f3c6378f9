"""Backend `tiles` of blocks: blocks of queries with the blocks of keys that they see, a few at a
time in memory that stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles import tiles
from attnzoo.engines.softmax.tiles.tile_pieces import (
    Cap,
    InPieces,
    Memory,
    Piece,
    Slices,
    Way,
    cap,
    kept,
)
from attnzoo.engines.sparse.blocks.block_layout import (
    LaidOut,
    runs,
    sorted_key_blocks,
    table_of,
)
from attnzoo.engines.sparse.blocks.gathered_blocks import head_by_head
from attnzoo.engines.sparse.blocks.ragged_blocks import in_tables_of_samples
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.sequences.bad_slots import clear_padding


def in_tiles(
    engine: SoftmaxReference,
    pattern: BlockPattern,
    call: Call,
    way: Way = tiles.IN_CACHE,
    filled_blocks: int | None = None,
) -> Tensor:
    """A·v for a block pattern, a few blocks of rows at a time on the CPU.

    engine: gives scale, dropout and softcap
    pattern: which key blocks each query block sees, the same for all samples
    call: the whole call, which may have a bias by distance
    way: how pieces are computed
    filled_blocks: blocks up to the last real token of the samples, which end in the same block;
        None: they are taken to end at the last slot

    Returns (batch, heads, query_length, value_dim).
    """
    grid, key_mask, laid_out = grid_of(call), call.key_mask, LaidOut.of(pattern, call)
    found, size = runs(pattern, grid, filled_blocks), laid_out.size
    ahead, spare = laid_out.ahead, laid_out.spare
    filled = key_mask
    if key_mask is None and any(run.tail for run in found):
        filled = torch.ones(1, grid.key_length, dtype=torch.bool, device="cpu")
    if filled is not None and spare:
        filled = torch.nn.functional.pad(filled, (0, spare))

    frame = call.frame()  # and not the call: autograd holds `compute`, which would hold its tensors

    def compute(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None) -> Tensor:
        real = frame(q, k[:, :, : grid.key_length], v[:, :, : grid.key_length])
        real = clear_padding(real)
        if filled_blocks is not None:
            rows = q[:, :, ahead : ahead + grid.query_length]
            out = in_tables_of_samples(engine, pattern, replace(real, q=rows))
            return torch.nn.functional.pad(out, (0, 0, ahead, q.shape[2] - ahead - out.shape[2]))
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, spare)) for x in (real.k, real.v))
        return head_by_head(engine, real, LaidOut(q, k, v, size, ahead, spare), blocks(), found)

    origin = laid_out.first_block(call) * size
    blocks = partial(sorted_key_blocks, pattern, grid)

    def pieces(q: Tensor, _: Tensor | None) -> list[list[Piece]]:
        return _pieces(q, pattern, grid, origin, way, filled_blocks)

    q, k, v = laid_out.q, laid_out.k, laid_out.v
    whole = InPieces(q, k, v, pieces, compute, filled, bias=call.get("distance_bias"))
    return laid_out.rows(way.attend(engine, whole), call)


@dataclass(frozen=True)
class Gathered:
    """A piece (`tile_pieces.Piece`) of consecutive blocks of rows, whose keys are fetched.

    first: its first row
    shape: blocks of rows, rows of each, keys of each
    chosen: the blocks of keys, those of every block of rows one after the other
    caps: what hides some of the keys
    origin: where row 0 stands, in the positions of the keys
    """

    first: int
    shape: tuple[int, int, int]
    chosen: Tensor
    caps: tuple[Cap, ...]
    origin: int

    def rows(self, x: Tensor) -> Tensor:
        parts, size, _ = self.shape
        return x.narrow(0, self.first, parts * size).view(parts, size, x.shape[1])

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        parts, size, keys = self.shape
        fetched = memory(name, len(self.chosen), size, x.shape[1])
        torch.index_select(x.view(-1, size, x.shape[1]), 0, self.chosen, out=fetched)
        return fetched.view(parts, keys, x.shape[1])

    def runs(self, key_length: int) -> Tensor:
        parts, size, _ = self.shape
        first = size * self.chosen.view(parts, -1)
        return torch.stack([first, torch.full_like(first, size)], 2)

    def add(self, gradient: Tensor, total: Tensor) -> None:
        size, width = self.shape[1], total.shape[1]
        total.view(-1, size, width).index_add_(0, self.chosen, gradient.view(-1, size, width))

    def add_bias(self, bias: Tensor, scores: Tensor) -> None:
        parts, size, keys = self.shape
        places = (
            self.origin + self.first + torch.arange(parts * size, device="cpu").view(parts, size, 1)
        )
        starts = self.chosen.view(parts, 1, -1) * size - places + len(bias) // 2
        scores.add_(bias.unfold(0, size, 1)[starts].view(parts, size, keys))


@kept
def _pieces(
    like: Tensor,
    pattern: BlockPattern,
    grid: Grid,
    origin: int,
    way: Way,
    filled_blocks: int | None,
) -> list[list[Piece]]:
    """The pieces of every head; heads that draw nothing of their own share theirs.

    like: of whose dtype the caps are
    origin: where row 0 stands
    way: how pieces are computed
    filled_blocks: as `in_tiles` takes it
    """
    size, found = pattern.block_size, runs(pattern, grid, filled_blocks)
    diagonal = cap(torch.ones(size, size, dtype=torch.bool, device="cpu").tril(), like)

    def of_head(blocks: Tensor) -> Iterator[Piece]:
        for run in found:
            keys = grid.key_length if run.sees_all else run.width * size
            caps = (Cap(keys - size, keys, diagonal),) if grid.is_causal and keys else ()
            together = way.together(size, max(1, keys), 1 if run.sees_all else None)
            for start in range(run.first, run.end, together):
                end = min(start + together, run.end)
                if run.sees_all or not keys:
                    shape = (1, (end - start) * size, keys)
                    yield Slices(start * size, shape, 0, origin=origin)
                else:
                    yield Gathered(
                        start * size,
                        (end - start, size, keys),
                        blocks[start:end, : run.width].flatten(),
                        caps,
                        origin,
                    )

    pieces = [list(of_head(own)) for own in table_of(pattern, grid, filled_blocks)]
    return pieces if len(pieces) == grid.heads else pieces * grid.heads
