"""What autograd keeps of a sparse softmax for the backward pass, in bytes, by the backend `blocks`;
as in `memory`.

In float32 and float64 (`in_cache`) that is q, k and v. In half precision torch's SDPA does the
work, piece by piece, and every piece keeps its own.
"""

from __future__ import annotations

from dataclasses import replace

from attnzoo.engines.engine import Shape
from attnzoo.engines.memory import INDEX_BYTES, fused
from attnzoo.engines.softmax import tiles
from attnzoo.engines.sparse import blocks as sparse_blocks
from attnzoo.engines.sparse import columns_memory, dilated
from attnzoo.engines.sparse import windows as sparse_windows
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window


def windows(
    pattern: Window,
    shape: Shape,
    global_keys: int = 0,
    global_queries: int = 0,
    *,
    logits: bool = False,
) -> int:
    """Of every dilation, q, k and v laid out for it; and which heads are whose, where there are
    several. global_keys, global_queries: of how many tokens. logits: the engine's softmax has one
    term more for each head."""
    parts, kept, plain = dilated.parts(pattern, shape), 0, replace(pattern, dilation=1)
    in_pieces = shape.dtype not in tiles.DTYPES  # by torch's SDPA
    if len(parts) > 1:
        kept += INDEX_BYTES * (shape.heads + sum(part.heads + part.kv_heads for part in parts))
        if logits and not in_pieces:  # those of every dilation
            kept += shape.heads * shape.dtype.itemsize
    for part in parts:
        columns = min(global_keys or pattern.sinks, shape.key_length)
        if columns or (logits and in_pieces):
            kept += columns_memory.beside(plain, part.shape, columns, logits=logits)
            kept += columns_memory.table(shape, part, columns)
            kept += (
                2 * replace(shape, kv_heads=part.kv_heads).key_bytes if global_keys else 0
            )  # of which columns are fetched
            continue
        masked = part.fold is not None and part.fold.spare > 0 and not shape.is_causal
        caps = (
            part.shape.batch_size * part.shape.key_length * shape.dtype.itemsize
            if masked and not in_pieces
            else 0
        )
        kept += (
            _plain_windows(plain, part.shape, masked=masked)
            + 2 * (part.key_bytes - part.shape.key_bytes)
            + caps
        )
    if global_keys:
        kept += shape.batch_size * global_keys * INDEX_BYTES
    elif (
        pattern.sinks
        and shape.is_causal
        and not in_pieces
        and any(part.dilation == 1 for part in parts)
    ):
        kept += shape.key_length * INDEX_BYTES
    if global_queries:
        (part, *_), layout = parts, columns_memory.pieces(plain, parts[0].shape)
        is_kept = part.fold is None and not (
            in_pieces and all(columns_memory.is_copied(shape, piece) for piece in layout)
        )
        kept += columns_memory.global_rows(shape, parts, global_queries, query_is_kept=is_kept)
    return kept


def _plain_windows(pattern: Window, shape: Shape, *, masked: bool) -> int:
    """Edges and blocks hold views of q, k and v; grouped heads cost the blocks a copy of their
    queries. masked: some keys are hidden, in half precision from a sample by itself."""
    if shape.dtype in tiles.DTYPES:
        return shape.input_bytes
    grid, group, size = _grid(shape), shape.heads // shape.kv_heads, shape.dtype.itemsize
    found = sparse_windows.plan(pattern, grid)
    edges = [edge for edge in sparse_windows.edges(pattern, grid) if edge[2] < edge[3]]
    kept = 2 * shape.key_bytes + (shape.query_bytes if edges or group == 1 else 0)
    for first, end, low, high in edges:
        kept += fused(shape, shape.heads * (end - first))
        samples = shape.batch_size if masked else 1
        if _edge_is_masked(pattern, grid, first, end, low, high):
            kept += samples * (end - first) * ((high - low) * size + 1)
        elif masked:
            kept += samples * ((high - low) * size + 1)
    if found.blocks:
        rows = found.blocks * sparse_windows.BLOCK
        sliced = shape.batch_size * shape.kv_heads * found.slice_length * shape.head_dim
        together = max(1, min(found.blocks, sparse_windows.SLICED // sliced))
        bands = -(-found.blocks // together)  # one mask for all blocks that are computed together
        band = group * sparse_windows.BLOCK * found.slice_length * size
        masks = (
            shape.batch_size * found.blocks * (band + group * sparse_windows.BLOCK)
            if masked
            else bands * band
        )
        kept += fused(shape, shape.heads * rows) + masks
        if group > 1:
            kept += shape.batch_size * shape.heads * rows * shape.head_dim * size
    return kept


def _edge_is_masked(pattern: Window, grid: Grid, first: int, end: int, low: int, high: int) -> bool:
    seen_by_first = grid.offset + first + (1 if grid.is_causal else pattern.window) >= high
    seen_by_last = grid.offset + end - 1 - pattern.window < low
    square = grid.offset + first == low and end - first == high - low
    return not (seen_by_last and (seen_by_first or (grid.is_causal and square)))


def blocks(pattern: BlockPattern, shape: Shape) -> int:
    """q, k and v, padded to whole blocks, and where blocks are fetched from. In half precision,
    every head's gathered keys and values."""
    grid, size, element = _grid(shape), pattern.block_size, shape.dtype.itemsize
    ahead, spare = grid.offset % size, -grid.key_length % size
    positions = ahead + shape.query_length + spare
    chosen = sparse_blocks.sorted_key_blocks(pattern, grid)
    per_number = shape.batch_size * shape.head_dim * element
    kept = shape.heads * positions * per_number
    if shape.dtype in tiles.DTYPES:
        slots = shape.key_length + spare
        key_cap = (
            slots * element if any(run.tail for run in sparse_blocks.runs(pattern, grid)) else 0
        )
        return kept + 2 * shape.kv_heads * slots * per_number + key_cap + chosen.nbytes
    whole_index = False
    found = [run for run in sparse_blocks.runs(pattern, grid) if run.width or run.sees_all]
    if any(run.sees_all for run in found):
        kept += 2 * shape.key_bytes
    for run in found:
        rows = run.end - run.first
        kept += fused(shape, shape.heads * rows * size)
        if run.sees_all:
            continue
        slots = run.width * size
        kept += 2 * shape.heads * rows * slots * per_number
        if rows == 1 or run.width == chosen.shape[2]:
            whole_index = True  # a view of the list of blocks
        else:
            kept += 2 * shape.heads * rows * run.width * INDEX_BYTES
        if shape.is_causal:
            kept += shape.heads * size * slots * element
        elif run.tail:
            kept += shape.heads * shape.batch_size * rows * slots * element
    return kept + (chosen.nbytes if whole_index else 0)


def _grid(shape: Shape) -> Grid:
    return Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
