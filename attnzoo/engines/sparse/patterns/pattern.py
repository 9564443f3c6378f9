"""Which keys a query may see: the support of a sparse A, as small patterns joined by `|` and `&`.

The support is where A may differ from 0. Query i stands at position key_length - query_length + i.
Causality is not a pattern: the engine hides later keys itself, and a pattern is told whether a call
is causal only because some (global blocks, random draws) then choose other keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of, padded
from attnzoo.sequences.padding import stand_on_leading, starts_real


@dataclass(frozen=True)
class BlockTable:
    """A pattern as a table of query blocks × key blocks, for a kernel that computes by blocks.

    ahead: empty rows before the first query, so that blocks of rows are blocks of positions
    seen: (heads or 1, query_blocks, key_blocks) bool, blocks in which some query sees some key
    whole: of the same shape, blocks in which every query sees every key
    """

    ahead: int
    seen: Tensor
    whole: Tensor


class Pattern:
    """A set of keys for every query.

    reach: how many keys back a causal query can see, its own included; None: to the first
    table_block_size: positions in a block of its `table`; None: it has no table
    farthest: keys at this distance or more are hidden inside the blocks of the table; None: every
        key of a block that is seen is visible, as far as causality allows
    counts_positions: whether it depends on how far a key stands from the first token, and not only
        on its distance from the query
    tied_to_end: whether, without causality, it depends on how far a key stands from the last token
    """

    reach: int | None = None
    table_block_size: int | None = None
    farthest: int | None = None
    counts_positions: bool = False
    tied_to_end: bool = False

    @property
    def remembers(self) -> int | None:
        """How many keys decoding must keep, at most; None: all."""
        return self.reach

    def mask(self, grid: Grid) -> Tensor:
        """The pattern as a mask without causality, (heads or 1, query_length, key_length) bool,
        True = visible; for a `PaddedGrid`, (batch or 1, heads or 1, query_length, key_length).

        grid: the sizes of the call
        """
        raise NotImplementedError

    def support(self, call: Call) -> Tensor:
        """The keys that the pattern shows in a call, before the call's own masks and causality.

        Positions count from the first real token of each sample. In a call with as many queries as
        keys, a row on padding before that token sees nothing.

        Returns (heads or 1, query_length, key_length) bool, with (batch or 1) in front where
        samples differ.
        """
        if call.key_mask is None or not self.counts_positions:
            return self.mask(grid_of(call))
        seen = self.mask(padded(grid_of(call), call.key_mask))
        if call.offset:
            return seen
        return seen & ~stand_on_leading(call.key_mask)[:, None, :, None]

    def is_fixed(self, call: Call) -> bool:
        """Whether `mask`, of the sizes alone, is the support of a call whose key_mask may be read,
        as long as each sample's end is counted where the pattern is `tied_to_end`."""
        return not self.counts_positions or starts_real(call.key_mask)

    def table(self, grid: Grid) -> BlockTable:
        """The pattern as a table of blocks, causality included, for these sizes."""
        raise NotImplementedError

    def hides_nothing(self, grid: Grid) -> bool:
        """Whether every query sees every key that causality shows it. False, too, where finding out
        would cost more time than knowing would save."""
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

    @property
    def tied_to_end(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.tied_to_end or self.right.tied_to_end

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

    @property
    def tied_to_end(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.tied_to_end or self.right.tied_to_end

    def mask(self, grid: Grid) -> Tensor:
        return self.left.mask(grid) & self.right.mask(grid)
