"""What autograd keeps of a fused softmax for the backward pass, in bytes.

Without masks in the call, and on the CPU, where torch's SDPA keeps q, k, v, its output, one
statistic a row, and a bool mask as numbers.
"""

from __future__ import annotations

from attnzoo.engines.engine import Shape

INDEX_BYTES = 8  # of an int64


def fused(shape: Shape, rows: int) -> int:
    """SDPA's output and statistic, for so many rows of a head in each sample."""
    return shape.batch_size * rows * (shape.head_dim * shape.dtype.itemsize + shape.sum_bytes)


def full(shape: Shape) -> int:
    """One SDPA call over all keys."""
    kept = shape.input_bytes + fused(shape, shape.heads * shape.query_length)
    if shape.is_causal and shape.query_length not in (
        1,
        shape.key_length,
    ):  # a mask, and which of its rows are empty
        kept += shape.query_length * (shape.key_length * shape.dtype.itemsize + 1)
    return kept
