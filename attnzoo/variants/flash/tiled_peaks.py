"""The most that torch's allocator holds in tiled attention, in bytes, without masks in the call:
what is as long as the sequence, and the tiles of scores, queries, keys and values that stand at the
busiest moment."""

from __future__ import annotations

from dataclasses import replace

from attnzoo.engines import peaks
from attnzoo.engines.engine import Shape, accumulation_dtype

# Tiles at a time in a forward: scores, of which weights are made in place, beside scores and
# weights of the tile before
SCORES = 3
SCORES_BACK = 4  # in a backward: weights, and what goes back through them, of two tiles


def forward(shape: Shape, size: int) -> int:
    """The output, a statistic of every row, and the tiles of one block of queries."""
    held = shape.query_bytes + peaks.statistic_bytes(shape)
    scores, queries = _scores(shape, size), _queries(shape, size)
    weighing = (SCORES + shape.is_causal) * scores + 3 * queries  # hiding later keys makes another
    adding = 2 * scores + 6 * queries  # rows as they were, shrunk, what the tile adds and the sum
    return max(peaks.looking_bytes(shape), held + max(weighing, adding) + _copied_keys(shape, size))


def training(shape: Shape, size: int) -> int:
    """With gradients in the precision of sums, which are rounded at the end."""
    wide = replace(shape, dtype=accumulation_dtype(shape.dtype))
    held = shape.query_bytes + peaks.statistic_bytes(shape) + wide.input_bytes
    converted = (
        3 if wide.dtype != shape.dtype else 0
    )  # queries, their outputs and what comes back to them
    tiles = (
        SCORES_BACK * _scores(shape, size)
        + (1 + converted) * _queries(shape, size)
        + 2 * _copied_keys(shape, size)
    )
    rounding = shape.input_bytes if converted else 0
    return max(forward(shape, size), held + max(tiles, rounding))


def _scores(shape: Shape, size: int) -> int:
    """Of one tile."""
    return (
        shape.batch_size
        * shape.heads
        * min(size, shape.query_length)
        * min(size, shape.key_length)
        * shape.sum_bytes
    )


def _queries(shape: Shape, size: int) -> int:
    return (
        shape.batch_size
        * shape.heads
        * min(size, shape.query_length)
        * shape.head_dim
        * shape.sum_bytes
    )


def _copied_keys(shape: Shape, size: int) -> int:
    """Of a tile of keys that is repeated for the heads that share them, or made wider."""
    is_copied = shape.heads > shape.kv_heads or shape.sum_bytes > shape.dtype.itemsize
    return (
        shape.batch_size
        * shape.heads
        * min(size, shape.key_length)
        * shape.head_dim
        * shape.sum_bytes
        if is_copied
        else 0
    )
