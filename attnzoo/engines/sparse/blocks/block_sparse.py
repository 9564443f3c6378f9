"""The sparse engine for patterns in whole blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import Cost, Shape
from attnzoo.engines.softmax.native import attend as native
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import REFERENCE
from attnzoo.engines.softmax.softmax import softmax_cost
from attnzoo.engines.softmax.tiles import tiles
from attnzoo.engines.sparse import dense, flex
from attnzoo.engines.sparse.blocks import (
    block_layout,
    block_tiles,
    gathered_blocks,
    ragged_blocks,
)
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.sparse import Sparse, from_first_real
from attnzoo.sequences.padding import ends, fills_slots


class BlockSparse(Sparse):
    """Softmax attention in which a block of queries sees blocks of keys.

    Its backends in order: `native_row`, one query in C++, and `native`, `tiles` in C++, where that
    has been compiled; `dense`, one SDPA call, where the pattern hides nothing; `flex`,
    FlexAttention; `tiles`, a few rows at a time in memory that stays in a CPU's cache; `blocks`,
    SDPA on gathered blocks of keys; `ragged`, the same for padded samples whose blocks count from
    their own ends; the reference.

    pattern: which blocks of keys each block of queries sees
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    """

    pattern: BlockPattern

    def layout(self, heads: int, queries: int, keys: int, is_causal: bool) -> Hashable:
        """Two layers' random blocks differ; what is computed with them need not."""
        grid = Grid(heads, queries, keys, is_causal)
        tables = len(block_layout.sorted_key_blocks(self.pattern, grid))
        return self.pattern.block_size, tables, tuple(block_layout.runs(self.pattern, grid))

    def sparse_cost(self, shape: Shape, grid: Grid) -> Cost:
        executed, support = block_layout.count_pairs(self.pattern, grid)
        return softmax_cost(shape, executed, support, self.pattern.remembers)


def _in_tiles(engine: BlockSparse, call: Call) -> Tensor:
    return block_tiles.in_tiles(engine, engine.pattern, call)


def _one_row(engine: BlockSparse, call: Call) -> Tensor:
    size, grid = engine.pattern.block_size, grid_of(call)
    whole = Grid(grid.heads, 1, grid.num_key_blocks(size) * size, grid.is_causal, "cpu")
    blocks = block_layout.blocks_of_last(engine.pattern, whole)
    return one_row.attend(engine, call, blocks=blocks, block_size=size)


def _one_row_why_not(engine: BlockSparse, call: Call) -> str | None:
    return _one_table_why_not(engine, call) or one_row.why_not(engine, call)


def _compiled(engine: BlockSparse, call: Call) -> Tensor:
    pattern, tiled = engine.pattern, partial(block_tiles.in_tiles, way=native.COMPILED)
    if call.key_mask is None or call.is_causal or not pattern.tied_to_end:
        return tiled(engine, pattern, call)
    filled = [-(-end // pattern.block_size) for end in ends(call.key_mask).tolist()]
    if len(set(filled)) == 1:
        return tiled(engine, pattern, call, filled_blocks=filled[0])
    samples = zip(call.split(batch=[1] * len(filled)), filled, strict=True)
    return torch.cat([tiled(engine, pattern, one, filled_blocks=blocks) for one, blocks in samples])


def _tiles_why_not(engine: BlockSparse, call: Call) -> str | None:
    return _one_table_why_not(engine, call) or tiles.why_not(engine, call)


def _in_gathered(engine: BlockSparse, call: Call) -> Tensor:
    return gathered_blocks.in_gathered(engine, engine.pattern, call)


def _one_table_why_not(engine: BlockSparse, call: Call) -> str | None:
    """Why one table of blocks does not serve every sample; None when it does."""
    if not engine.pattern.tied_to_end or call.is_causal or fills_slots(call.key_mask):
        return None
    return "samples may begin or end at different slots, for which `ragged` is"


def _in_tables_of_samples(engine: BlockSparse, call: Call) -> Tensor:
    return ragged_blocks.in_tables_of_samples(engine, engine.pattern, call)


def _ragged_why_not(engine: BlockSparse, call: Call) -> str | None:
    if call.key_mask is None:
        return "it is for padded samples, and there is no key_mask"
    if not engine.pattern.tied_to_end or call.is_causal:
        return "it is for patterns that count from the end, and this call's does not"
    return None


def _flex(engine: BlockSparse, call: Call) -> Tensor:
    return flex.attend(engine, engine.pattern, call)


def _flex_why_not(engine: BlockSparse, call: Call) -> str | None:
    reason = flex.why_not(engine, call)
    if reason is not None or call.key_mask is None or call.is_causal:
        return reason
    if engine.pattern.tied_to_end:
        return "its tables know one end, and padded samples have their own"
    return None


_ROW = one_row.backend(_one_row, _one_row_why_not)
BlockSparse.backends = (
    replace(from_first_real(_ROW.name, _ROW.run, _ROW.why_not), untried=_ROW.untried),
    replace(
        from_first_real("native", _compiled, native.why_not),
        untried=lambda engine, call: native.passed_over(call),
        skips_padding=lambda engine, call: True,
    ),
    from_first_real("dense", dense.attend, dense.why_not),
    replace(from_first_real("flex", _flex, _flex_why_not), untried=flex.untried),
    from_first_real("tiles", _in_tiles, _tiles_why_not),
    from_first_real("blocks", _in_gathered, _one_table_why_not),
    from_first_real("ragged", _in_tables_of_samples, _ragged_why_not),
    REFERENCE,
)
