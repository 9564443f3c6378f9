"""Patterns in whole blocks of positions: blocks near the query, global blocks, and their unions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.arguments import check_count, check_positive
from attnzoo.eager import unrecorded
from attnzoo.engines.sparse.patterns.grid import Grid, PaddedGrid
from attnzoo.engines.sparse.patterns.pattern import BlockTable, Pattern, Union


class BlockPattern(Pattern):
    """A pattern in whole blocks of positions, so that the engine can fetch keys block by block.

    block_size: number of positions in a block
    """

    block_size: int
    counts_positions = True

    @property
    def most_blocks(self) -> int:
        """How many key blocks a query block lists at most."""
        raise NotImplementedError

    def key_blocks(self, grid: Grid) -> Tensor:
        """The numbers of the key blocks that each query block sees, (heads or 1, query_blocks,
        width), with (batch,) in front in a `PaddedGrid`.

        -1 stands for no block, and a block may be listed twice. A query block that sees everything
        (`sees_all`) may list any of the blocks.
        """
        raise NotImplementedError

    def sees_all(self, grid: Grid) -> Tensor:
        """Which query blocks see every key, (1, query_blocks) bool, or (batch, 1, query_blocks) in
        a `PaddedGrid`."""
        return torch.zeros_like(grid.query_blocks(self.block_size), dtype=torch.bool)[None]

    def seen_blocks(self, grid: Grid) -> Tensor:
        """`key_blocks` and `sees_all` as one table without causality, (heads or 1, query_blocks,
        key_blocks) bool, with (batch,) in front in a `PaddedGrid`."""
        blocks = self.key_blocks(grid)
        count = grid.num_key_blocks(self.block_size)
        seen = blocks.new_zeros(*blocks.shape[:-1], count + 1, dtype=torch.bool)
        # The extra column takes the -1, and is cut off.
        seen.scatter_(-1, blocks % (count + 1), torch.ones_like(blocks, dtype=torch.bool))
        return seen[..., :count] | self.sees_all(grid)[..., None]

    @property
    def table_block_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.block_size

    def table(self, grid: Grid) -> BlockTable:
        seen, ahead = self.seen_blocks(grid), grid.offset % self.block_size
        keys = torch.arange(seen.shape[2], device=grid.device)
        inside = (keys + 1) * self.block_size <= grid.key_length
        if not grid.is_causal:
            return BlockTable(ahead, seen, seen & inside)
        rows = grid.query_blocks(self.block_size)[:, None]
        return BlockTable(ahead, seen & (keys <= rows), seen & (keys < rows) & inside)

    def hides_nothing(self, grid: Grid) -> bool:
        if torch.compiler.is_compiling() or grid.num_key_blocks(self.block_size) > self.most_blocks:
            return False
        return _sees_every_block(self, replace(grid, device="cpu"))

    def mask(self, grid: Grid) -> Tensor:
        seen, size = self.seen_blocks(grid), self.block_size
        if not isinstance(grid, PaddedGrid) or grid.first is None:
            return self.spread(seen, grid)
        queries, keys = (x // size for x in (grid.query_positions(), grid.key_positions()))
        rows = queries - grid.query_blocks(self.block_size)[0]
        ahead = [torch.arange(size, device=seen.device) for size in seen.shape[:-2]]
        ahead = [x.view(-1, *[1] * (seen.dim() - 1 - place)) for place, x in enumerate(ahead)]
        return seen[(*ahead, rows, keys.clamp(min=0))]

    def spread(self, table: Tensor, grid: Grid) -> Tensor:
        """What a table of blocks holds, at every token, where all samples begin at slot 0.

        table: (..., query_blocks, key_blocks), as of `seen_blocks`

        Returns (..., query_length, key_length).
        """
        size = self.block_size
        rows, first = (size, grid.offset % size) if grid.query_length > 1 else (1, 0)
        tokens = table[..., :, None, :, None].expand(*table.shape[:-1], rows, -1, size)
        whole = tokens.flatten(-2).flatten(-3, -2)
        return whole[..., first : first + grid.query_length, : grid.key_length]

    def __or__(self, other: Pattern) -> Pattern:
        if isinstance(other, BlockPattern) and other.block_size == self.block_size:
            return BlockUnion(self, other)
        return Union(self, other)


@lru_cache
def _sees_every_block(pattern: BlockPattern, grid: Grid) -> bool:
    """Whether each query block sees every key block that causality shows it."""
    with unrecorded():
        hidden = ~pattern.seen_blocks(grid)
        if grid.is_causal:
            hidden &= grid.query_blocks(pattern.block_size)[:, None] >= torch.arange(
                hidden.shape[2], device=hidden.device
            )
        return not bool(hidden.any())


@dataclass(frozen=True)
class BlockUnion(BlockPattern):
    """The blocks that at least one of two patterns of the same block size shows."""

    left: BlockPattern
    right: BlockPattern

    @property
    def tied_to_end(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.tied_to_end or self.right.tied_to_end

    @property
    def block_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.block_size

    @property
    def most_blocks(self) -> int:
        return self.left.most_blocks + self.right.most_blocks

    def key_blocks(self, grid: Grid) -> Tensor:
        left, right = self.left.key_blocks(grid), self.right.key_blocks(grid)
        heads = max(left.shape[-3], right.shape[-3])
        sizes = [(*x.shape[:-3], heads, *x.shape[-2:]) for x in (left, right)]
        return torch.cat([left.expand(sizes[0]), right.expand(sizes[1])], -1)

    def sees_all(self, grid: Grid) -> Tensor:
        return self.left.sees_all(grid) | self.right.sees_all(grid)


@dataclass(frozen=True)
class WindowBlocks(BlockPattern):
    """The query's own block and its neighbours.

    num_blocks: how many blocks in all, an odd number, so that as many stand on each side
    block_size: number of positions in a block
    """

    num_blocks: int
    block_size: int

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        if check_positive("num_window_blocks", self.num_blocks) % 2 == 0:
            raise ValueError(
                f"num_window_blocks={self.num_blocks} must be odd: the query's own block and as "
                "many on each side"
            )

    @property
    def most_blocks(self) -> int:
        return self.num_blocks

    def key_blocks(self, grid: Grid) -> Tensor:
        side = (self.num_blocks - 1) // 2
        blocks = grid.query_blocks(self.block_size)[:, None] + torch.arange(
            -side, side + 1, device=grid.device
        )
        inside = (blocks >= 0) & (blocks < grid.filled_blocks(self.block_size)[..., None])
        return blocks.where(inside, -1)


@dataclass(frozen=True)
class GlobalBlocks(BlockPattern):
    """Blocks whose keys every query sees, and whose queries see every key.

    They are the first blocks in a causal call; else half of them are the first and half the last
    blocks, with one more at the beginning if the number is odd.

    num_blocks: how many blocks in all
    block_size: number of positions in a block
    """

    num_blocks: int
    block_size: int
    tied_to_end = True

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        check_count("num_global_blocks", self.num_blocks)

    @property
    def most_blocks(self) -> int:
        return self.num_blocks

    def _blocks(self, grid: Grid) -> Tensor:
        """The numbers of the global blocks, (1, 1, num_blocks), or (batch, 1, 1, num_blocks) in a
        `PaddedGrid`; -1 where a sample has fewer blocks."""
        count = grid.filled_blocks(self.block_size)[..., None]
        index = torch.arange(self.num_blocks, device=grid.device)
        first = self.num_blocks if grid.is_causal else -(-self.num_blocks // 2)
        blocks = torch.where(index < first, index, count - self.num_blocks + index)
        return blocks.where((blocks >= 0) & (blocks < count), -1)

    def key_blocks(self, grid: Grid) -> Tensor:
        rows, blocks = len(grid.query_blocks(self.block_size)), self._blocks(grid)
        return blocks.expand(*blocks.shape[:-2], rows, -1)

    def sees_all(self, grid: Grid) -> Tensor:
        blocks = self._blocks(grid)
        return ((grid.query_blocks(self.block_size)[:, None] == blocks) & (blocks >= 0)).any(-1)


def block_limit(grid: Grid, block_size: int) -> Tensor:
    """For each query block, the number of the first key block that causality or the end of the keys
    hides from it, (1, query_blocks), or (batch, 1, query_blocks) in a `PaddedGrid`."""
    rows = grid.query_blocks(block_size)
    limit = grid.filled_blocks(block_size)
    if grid.is_causal:
        return limit.minimum((rows + 1).clamp(min=0))
    return limit.expand(*limit.shape[:-1], len(rows))


def distinct(blocks: Tensor, limit: Tensor | int) -> Tensor:
    """Lists of key blocks as sets: sorted, each block once.

    blocks: (..., width), numbers of key blocks, -1 for none
    limit: (...), or a number: blocks from this one on are removed

    Returns the same shape, in ascending order; repetitions and whatever was removed have become a
    number larger than any block's, at the end.
    """
    nowhere = torch.iinfo(torch.int64).max
    blocks = (
        blocks.where(
            (blocks >= 0) & (blocks < torch.as_tensor(limit, device=blocks.device)[..., None]),
            nowhere,
        )
        .sort(-1)
        .values
    )
    repeated = torch.zeros_like(blocks, dtype=torch.bool)
    repeated[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    return blocks.masked_fill(repeated, nowhere).sort(-1).values
