"""What autograd keeps of a window with columns beside it (`sparse_columns`) and of the rows of
global tokens, in bytes; as in `memory`."""

from __future__ import annotations

from attnzoo.engines.engine import Shape
from attnzoo.engines.memory import INDEX_BYTES, fused
from attnzoo.engines.softmax import tiles
from attnzoo.engines.sparse import windows
from attnzoo.engines.sparse.dilated import Part
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window

Piece = tuple[int, int, int]  # parts, rows of a part, its keys


def pieces(pattern: Window, shape: Shape, *, recording: bool = True) -> list[Piece]:
    """What torch's SDPA is asked for one after the other: the edges and the whole blocks, where a
    gradient will be some at a time."""
    grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
    found = windows.plan(pattern, grid)
    edges = [(1, end - first, high - low) for first, end, low, high in windows.edges(pattern, grid)]
    if not found.blocks:
        return edges
    sliced = shape.batch_size * shape.kv_heads * found.slice_length * shape.head_dim
    together = max(1, min(found.blocks, windows.SLICED // sliced)) if recording else found.blocks
    counts = [min(together, found.blocks - start) for start in range(0, found.blocks, together)]
    return edges + [(count, windows.BLOCK, found.slice_length) for count in counts]


def beside(pattern: Window, shape: Shape, count: int, *, logits: bool) -> int:
    """q, k and v with `count` columns; in half precision, copies of those for every piece. pattern:
    plain. logits: the softmax has one term more."""
    if shape.dtype in tiles.DTYPES:
        keys = shape.key_length + count
        longer = 2 * shape.batch_size * shape.kv_heads * keys * shape.head_dim
        return shape.query_bytes + (longer + shape.batch_size * keys) * shape.dtype.itemsize
    kept = (
        shape.query_bytes
        if any(not is_copied(shape, piece) for piece in pieces(pattern, shape)) and not logits
        else 0
    )
    for parts, size, width in pieces(pattern, shape):
        rows, keys = parts * size, width + count
        scores = (
            shape.batch_size * rows * (shape.heads // shape.kv_heads) * keys
        )  # of a mask, the same for every key head
        queries = shape.batch_size * shape.heads * rows
        copies = 2 * shape.batch_size * shape.kv_heads * parts * keys * shape.head_dim
        if logits:  # in the precision of sums, with A itself
            kept += (copies + queries * (shape.head_dim + keys + 1)) * shape.sum_bytes + scores
            continue
        kept += (
            (copies + scores) * shape.dtype.itemsize
            + queries // shape.kv_heads
            + fused(shape, shape.heads * rows)
        )
        if is_copied(shape, (parts, size, width)):
            kept += queries * shape.head_dim * shape.dtype.itemsize
    return kept


def is_copied(shape: Shape, piece: Piece) -> bool:
    """Whether the queries of a piece are laid out anew: those of heads that share keys, unless it
    is one query or all."""
    parts, size, _ = piece
    return shape.heads > shape.kv_heads and (parts > 1 or 1 < size < shape.query_length)


def table(shape: Shape, part: Part, count: int) -> int:
    """Where the columns stand, for every class of positions of a dilated window."""
    if not shape.is_causal or shape.dtype not in tiles.DTYPES:
        return 0
    return part.shape.batch_size * count * INDEX_BYTES if part.dilation > 1 else 0


def global_rows(shape: Shape, parts: list[Part], count: int, *, query_is_kept: bool) -> int:
    """Rows of `count` global tokens over all keys; the other rows, over which they are written; and
    the inputs, where nothing else keeps them."""
    fold, whole = parts[0].fold, shape.query_bytes
    if len(parts) == 1 and fold is not None:
        whole = parts[0].shape.query_bytes
    rows = shape.batch_size * count
    kept = (
        rows * (INDEX_BYTES + 1 + shape.heads * shape.head_dim * shape.dtype.itemsize)
        + fused(shape, shape.heads * count)
        + whole
    )
    if shape.is_causal:  # a mask, and which of its rows are empty
        kept += rows * (shape.key_length * shape.dtype.itemsize + 1)
    if len(parts) > 1:
        return kept + shape.input_bytes
    return kept + (0 if query_is_kept else shape.query_bytes)
