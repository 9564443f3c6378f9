"""Which keys a query may see: the support of a sparse A, as small patterns joined by `|` and `&`.

Query i stands at position key_length - query_length + i. Causality is not a pattern: the engine
intersects with it, and a pattern is told of it only because some (global blocks, random draws)
choose differently then.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of, padded
from attnzoo.sequences.padding import stand_on_leading


@dataclass(frozen=True)
class BlockTable:
    """A pattern as blocks of queries and keys, for a kernel that walks such a table.

    ahead: empty rows before the first query, so that blocks of rows are blocks of positions.
    seen, whole: (heads or 1, query_blocks, key_blocks) bool, blocks that hold a visible key, and
        blocks in which every key is visible to every query.
    """

    ahead: int
    seen: Tensor
    whole: Tensor


class Pattern:
    """A set of keys for every query. reach: how many keys back a causal query can see, itself
    included (None: to the first).

    table_block_size: positions in a block of its `table` (None: it has none). farthest: keys at
    this distance or more are hidden inside the blocks of the table (None: the blocks say it all).
    counts_positions: whether it depends on how far from the first token a key stands, and not on
    distances alone. tied_to_end: whether, without causality, it depends on how far from the last.
    """

    reach: int | None = None
    table_block_size: int | None = None
    farthest: int | None = None
    counts_positions: bool = False
    tied_to_end: bool = False

    @property
    def remembers(self) -> int | None:
        """How many keys decoding must keep, at most (None: all)."""
        return self.reach

    def mask(self, grid: Grid) -> Tensor:
        """(heads or 1, query_length, key_length) bool, True = visible, causality left out; in a
        `PaddedGrid` (batch or 1, heads or 1, query_length, key_length)."""
        raise NotImplementedError

    def support(self, call: Call) -> Tensor:
        """The keys that the pattern shows in a call, its masks left out, (batch or 1, heads or 1,
        query_length, key_length) bool. Positions count from the first real token of a sample, and
        in a square call a row on leading padding sees nothing."""
        if call.key_mask is None or not self.counts_positions:
            return self.mask(grid_of(call))
        seen = self.mask(padded(grid_of(call), call.key_mask))
        if call.offset:
            return seen
        return seen & ~stand_on_leading(call.key_mask)[:, None, :, None]

    def table(self, grid: Grid) -> BlockTable:
        """The pattern as blocks."""
        raise NotImplementedError

    def hides_nothing(self, grid: Grid) -> bool:
        """Whether every query sees every key that causality shows it. False also where finding out
        would cost more than it brings."""
        return False

    def __or__(self, other: Pattern) -> Pattern:
        return Union(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(self, other)


@dataclass(frozen=True)
class Union(Pattern):
    """Keys that either pattern shows."""

    left: Pattern
    right: Pattern

    @property
    def reach(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        reaches = (self.left.reach, self.right.reach)
        return None if None in reaches else max(r for r in reaches if r is not None)

    @property
    def counts_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.counts_positions or self.right.counts_positions

    def mask(self, grid: Grid) -> Tensor:
        return self.left.mask(grid) | self.right.mask(grid)


@dataclass(frozen=True)
class Intersection(Pattern):
    """Keys that both patterns show."""

    left: Pattern
    right: Pattern

    @property
    def reach(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return min((r for r in (self.left.reach, self.right.reach) if r is not None), default=None)

    @property
    def counts_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.counts_positions or self.right.counts_positions

    def mask(self, grid: Grid) -> Tensor:
        return self.left.mask(grid) & self.right.mask(grid)
