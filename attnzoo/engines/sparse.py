"""Engine 2, sparse: softmax on the support that a pattern draws, without ever laying it out over n × n."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines import sparse_blocks, sparse_dilated, sparse_flex, sparse_memory, sparse_peaks, sparse_windows
from attnzoo.engines.cache import KeyValueCache
from attnzoo.engines.engine import Backend, Cost, Shape, never_refuses
from attnzoo.engines.softmax import Softmax, attend_densely, softmax_cost, visible
from attnzoo.patterns import BlockPattern, Grid, Pattern, Window, grid_of


class Sparse(Softmax):
    """Softmax attention in which query i sees only the keys that `pattern` shows it (and the masks allow)."""

    def __init__(self, pattern: Pattern, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__(scale, dropout)
        self.pattern = pattern

    def init_state(self, batch_size: int, kv_heads: int, head_dim: int, max_length: int | None, dtype: torch.dtype, device: Any) -> KeyValueCache:
        reach = self.pattern.reach
        return KeyValueCache.empty(batch_size, kv_heads, head_dim, max_length, None if reach is None else reach - 1, dtype, device)

    def cost(self, shape: Shape) -> Cost:
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        if isinstance(self.pattern, Window):
            executed, support = sparse_dilated.count_executed(self.pattern, shape), sparse_dilated.count_support(self.pattern, grid)
            kept, found = sparse_memory.windows(self.pattern, shape), sparse_peaks.windows(self.pattern, shape)
        elif isinstance(self.pattern, BlockPattern):
            executed, support = sparse_blocks.count_pairs(self.pattern, grid)
            kept, found = sparse_memory.blocks(self.pattern, shape), sparse_peaks.blocks(self.pattern, shape)
        else:
            executed = shape.heads * shape.query_length * shape.key_length
            support, kept, found = _count_pairs(self.pattern, grid), None, None
        forward_bytes, training_bytes = found or (None, None)
        cost = softmax_cost(shape, executed, support, self.pattern.reach, kept)
        return replace(cost, forward_bytes=forward_bytes, training_bytes=training_bytes)


def _count_pairs(pattern: Pattern, grid: Grid) -> int:
    """Visible (head, query, key) triples of a pattern without a layout in blocks: over its whole mask, as its only backend does."""
    mask = pattern.mask(grid)
    if grid.is_causal:
        mask = mask & torch.ones(grid.query_length, grid.key_length, dtype=torch.bool).tril(grid.offset)
    return int(mask.sum()) * (grid.heads // mask.shape[0])


def _reference(engine: Sparse, call: Call) -> Tensor:
    mask, pattern = visible(call), engine.pattern.mask(grid_of(call))
    return attend_densely(engine, call, pattern if mask is None else pattern & mask)


def _blocks(engine: Sparse, call: Call) -> Tensor:
    if isinstance(engine.pattern, Window):
        return sparse_dilated.attend(engine.pattern, call, lambda window, part: sparse_windows.attend(engine, window, part, grid_of(part)))
    assert isinstance(engine.pattern, BlockPattern)
    return sparse_blocks.attend(engine, engine.pattern, call, grid_of(call))


def _blocks_why_not(engine: Sparse, call: Call) -> str | None:
    if isinstance(engine.pattern, Window | BlockPattern):
        return None
    return f"the pattern {type(engine.pattern).__name__} has no layout in blocks"


Sparse.backends = (
    Backend("blocks", _blocks, _blocks_why_not),
    Backend("flex", sparse_flex.run, sparse_flex.why_not),  # by name only, until it has run on a GPU
    Backend("reference", _reference, never_refuses),
)
