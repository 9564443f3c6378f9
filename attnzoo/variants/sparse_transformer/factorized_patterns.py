"""The two factors of a Sparse Transformer's patterns, of `stride` positions: one that sees what is
near, one that sees far in steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.arguments import check_positive
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.pattern import Pattern


@dataclass(frozen=True)
class Factor(Pattern):
    """Keys of one factor. `limit` is the first position that a query cannot see: key_length, or the
    one after its own when causal."""

    stride: int

    def __post_init__(self) -> None:
        check_positive("stride", self.stride)

    def ranges(self, position: int, limit: int) -> list[range]:
        """Keys of the query at `position`, below limit."""
        raise NotImplementedError

    def count(self, positions: Tensor, limit: Tensor) -> Tensor:
        """How many keys each query has."""
        raise NotImplementedError

    def adds(self, grid: Grid) -> bool:
        """Whether, as a second factor, it shows a query a key that the first does not."""
        raise NotImplementedError


class Neighbours(Factor):
    """Strided attention's first factor: |i - j| <= stride."""

    def mask(self, grid: Grid) -> Tensor:
        return (grid.query_positions() - grid.key_positions()).abs() <= self.stride

    def ranges(self, position: int, limit: int) -> list[range]:
        return [range(max(0, position - self.stride), min(position + self.stride + 1, limit))]

    def count(self, positions: Tensor, limit: Tensor) -> Tensor:
        return (
            limit.minimum(positions + self.stride + 1) - (positions - self.stride).clamp(min=0)
        ).clamp(min=0)


class Strided(Factor):
    """Strided attention's second factor: stride divides i - j."""

    def mask(self, grid: Grid) -> Tensor:
        return (grid.query_positions() - grid.key_positions()) % self.stride == 0

    def ranges(self, position: int, limit: int) -> list[range]:
        return [range(position % self.stride, limit, self.stride)]

    def adds(self, grid: Grid) -> bool:
        last, near = grid.key_length - 1, 2 * self.stride  # a key one stride away is a neighbour
        return last >= near or (not grid.is_causal and max(grid.offset + near, 0) <= last)

    def count(self, positions: Tensor, limit: Tensor) -> Tensor:
        return (
            (limit - positions % self.stride + self.stride - 1).div(
                self.stride, rounding_mode="floor"
            )
        ).clamp(min=0)


class OwnBlock(Factor):
    """Fixed attention's first factor: keys in the query's own block of `stride` positions."""

    counts_positions = True

    def mask(self, grid: Grid) -> Tensor:
        queries, keys = (
            x.div(self.stride, rounding_mode="floor")
            for x in (grid.query_positions(), grid.key_positions())
        )
        return queries == keys

    def ranges(self, position: int, limit: int) -> list[range]:
        start = position // self.stride * self.stride
        return [range(max(0, start), min(start + self.stride, limit))]

    def count(self, positions: Tensor, limit: Tensor) -> Tensor:
        start = positions.div(self.stride, rounding_mode="floor") * self.stride
        return (limit.minimum(start + self.stride) - start.clamp(min=0)).clamp(min=0)


@dataclass(frozen=True)
class Summaries(Factor):
    """Fixed attention's second factor: the last `width` positions of every block."""

    width: int
    counts_positions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_positive("expressivity", self.width) > self.stride:
            raise ValueError(
                f"expressivity={self.width} must be at most stride={self.stride}: it counts "
                "positions of a block"
            )

    def mask(self, grid: Grid) -> Tensor:
        seen = grid.key_positions() % self.stride >= self.stride - self.width
        return seen.expand(*seen.shape[:-2], grid.query_length, -1)

    def ranges(self, position: int, limit: int) -> list[range]:
        starts = range(self.stride - self.width, limit, self.stride)
        return [range(start, min(start + self.width, limit)) for start in starts]

    def adds(self, grid: Grid) -> bool:
        if grid.is_causal:
            return grid.key_length > self.stride
        blocks = range(
            (grid.key_length - self.stride + self.width - 1) // self.stride + 1
        )  # that have a summary
        rows = (grid.offset // self.stride, (grid.key_length - 1) // self.stride)
        return len(blocks) > 1 or (len(blocks) == 1 and rows != (0, 0))

    def count(self, positions: Tensor, limit: Tensor) -> Tensor:
        limit = limit.clamp(min=0)
        return limit // self.stride * self.width + (
            limit % self.stride - self.stride + self.width
        ).clamp(min=0)


@dataclass(frozen=True)
class ByHead(Pattern):
    """Heads take turns: the first has the first pattern, the next the second, and so on.
    first_head: the number of the grid's first head."""

    patterns: tuple[Factor, ...]
    first_head: int = 0

    @property
    def counts_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(pattern.counts_positions for pattern in self.patterns)

    def heads_of(self, heads: int) -> list[tuple[Factor, list[int]]]:
        """Every pattern that has heads, and these."""
        turns = [(self.first_head + head) % len(self.patterns) for head in range(heads)]
        found = [
            (pattern, [head for head in range(heads) if turns[head] == turn])
            for turn, pattern in enumerate(self.patterns)
        ]
        return [(pattern, own) for pattern, own in found if own]

    def mask(self, grid: Grid) -> Tensor:
        masks = [pattern.mask(grid) for pattern in self.patterns]
        return torch.cat(
            [masks[(self.first_head + head) % len(masks)] for head in range(grid.heads)], -3
        )
