"""Where the rows and keys of a window stand: blocks of rows whose window lies inside the keys, and
edges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window

# Rows of a block, which share a slice of the keys: more waste scores outside the window, fewer
# starve the matmuls.
BLOCK = 64
LINE = 16  # a slice is a multiple of so many keys, so that rows of scores are aligned
EDGE = 2 * BLOCK  # rows of an edge that share keys, where the edge is long
LONG = 8 * BLOCK  # an edge of so many rows is long


class Rectangle(NamedTuple):
    """Rows first..end and the keys low..high, which hold all that these rows see."""

    first: int
    end: int
    low: int
    high: int


@dataclass(frozen=True)
class Plan:
    """How the rows of a call are computed: whole blocks from row `start` to `stop`, and edges
    before and behind.

    start, stop: of the rows whose window lies inside the keys, in whole blocks
    before: keys of a slice that stand before its block's first query
    slice_length: keys of a slice
    """

    start: int
    stop: int
    before: int
    slice_length: int

    @property
    def blocks(self) -> int:
        """Number of whole blocks."""
        return (self.stop - self.start) // BLOCK

    def has(self, rows: Rectangle) -> bool:
        """Whether these rows are whole blocks; else they are an edge."""
        return self.blocks > 0 and self.start <= rows.first < self.stop


def plan(pattern: Window, grid: Grid) -> Plan:
    """Which rows of a call are computed in whole blocks.

    pattern: a window without dilation
    grid: the sizes of the call
    """
    after = 0 if grid.is_causal else pattern.window - 1
    before = pattern.window - 1 + -(pattern.window - 1 + BLOCK + after) % LINE
    start = min(max(0, before - grid.offset), grid.query_length)
    end = min(grid.query_length, grid.key_length - after - grid.offset)
    blocks = max(0, end - start) // BLOCK
    return Plan(start, start + blocks * BLOCK, before, before + BLOCK + after)


def edges(pattern: Window, grid: Grid) -> list[Rectangle]:
    """The rows outside of whole blocks, in order. A long edge is cut: its rows together would lie
    in a rectangle of which they see little more than a triangle.

    pattern: a window without dilation
    grid: the sizes of the call
    """
    found = plan(pattern, grid)
    ends = (
        [(0, found.start), (found.stop, grid.query_length)]
        if found.blocks
        else [(0, grid.query_length)]
    )
    after = 1 if grid.is_causal else pattern.window
    rectangles = []
    for first, end in (span for whole in ends for span in _cut(*whole)):
        low = max(0, grid.offset + first - pattern.window + 1)
        high = min(grid.key_length, grid.offset + end - 1 + after)
        if first < end:
            rectangles.append(Rectangle(first, end, low, max(low, high)))
    return rectangles


def _cut(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Rows first..end of an edge as the spans that share keys."""
    rows = EDGE if end - first >= LONG else max(1, end - first)
    for start in range(first, end, rows):
        yield start, min(start + rows, end)


def count_pairs(pattern: Window, grid: Grid) -> int:
    """How many (query, key) pairs of one head are computed.

    pattern: a window without dilation
    grid: the sizes of the call
    """
    found = plan(pattern, grid)
    return found.blocks * BLOCK * found.slice_length + sum(
        (end - first) * (high - low) for first, end, low, high in edges(pattern, grid)
    )


def band(pattern: Window, grid: Grid, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Which keys the window shows to which queries, (queries, keys) bool.

    pattern: a window without dilation
    grid: says whether the call is causal
    query_positions: (queries,)
    key_positions: (keys,)
    """
    distance = query_positions[:, None] - key_positions
    near = distance.abs() < pattern.window
    return near & (distance >= 0) if grid.is_causal else near
