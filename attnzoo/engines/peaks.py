"""The most that torch's allocator holds at any moment, in bytes, by torch's SDPA on the CPU and
without masks in the call.

SDPA holds its output and one statistic a row; while it runs, every thread has working memory of a
fixed size. Its backward pass holds the gradients of q, k and v, laid out with the heads inside the
length as its output is, so that whatever meets them from outside is copied into that order: the
output's gradient before, their own after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.engines.engine import Shape

KEYS = 512  # that a thread works on at a time
QUERIES = ((768, 256), (192, 64), (0, 32))  # so many from so many rows on


def forward(shape: Shape) -> int:
    """One forward of SDPA over all keys, by itself and under a causal mask."""
    statistic, mask = statistic_bytes(shape), causal_mask(shape)
    running = shape.query_bytes + statistic + mask.held + mask.numbers + working_bytes(shape)
    emptying = 2 * shape.query_bytes + mask.held if mask.held else 0
    return max(looking_bytes(shape), running, emptying)


def training(shape: Shape) -> int:
    """A forward of SDPA that records, and its backward pass."""
    out, keys, statistic, mask = (
        shape.query_bytes,
        2 * shape.key_bytes,
        statistic_bytes(shape),
        causal_mask(shape),
    )
    held = out + statistic + mask.numbers
    recording = held + mask.held + working_bytes(shape)
    emptied = (
        out if mask.held else 0
    )  # the output with its empty rows zeroed, and its gradient likewise
    emptying = held + mask.held + emptied
    relaid = relaid_bytes(shape.query_bytes, shape.heads, shape.query_length)
    backward = (
        held + 2 * emptied + shape.query_bytes + keys + relaid + backward_working_bytes(shape)
    )
    giving = (
        out
        + shape.query_bytes
        + keys
        + max(relaid, relaid_bytes(shape.key_bytes, shape.kv_heads, shape.key_length))
    )
    return max(looking_bytes(shape), recording, emptying, backward, giving)


@dataclass(frozen=True)
class CausalMask:
    """held: the bool mask twice, as drawn and without its empty rows, and which those are. numbers:
    the mask as SDPA takes it."""

    held: int = 0
    numbers: int = 0


def causal_mask(shape: Shape) -> CausalMask:
    """SDPA's own causality serves a square call, and one query sees everything."""
    if not shape.is_causal or shape.query_length in (1, shape.key_length):
        return CausalMask()
    pairs = shape.query_length * shape.key_length
    return CausalMask(2 * pairs + shape.query_length, pairs * shape.dtype.itemsize)


def looking_bytes(shape: Shape) -> int:
    """A causal call looks for numbers that are not finite; in half precision it sums k, then v, as
    float32."""
    widened = shape.key_bytes // shape.dtype.itemsize * shape.sum_bytes
    return widened if shape.is_causal and shape.sum_bytes > shape.dtype.itemsize else 0


def statistic_bytes(shape: Shape) -> int:
    """One number a row."""
    return shape.batch_size * shape.heads * shape.query_length * shape.sum_bytes


def relaid_bytes(bytes_: int, heads: int, length: int) -> int:
    """A copy in the other order of heads and length; none where the two orders are one."""
    return bytes_ if heads > 1 and length > 1 else 0


def working_bytes(shape: Shape) -> int:
    """Of the forward kernel: scores, maximum and sum of a row, and the output of a few rows; the
    scores again in half precision."""
    rows, keys = _tile(shape)
    scores = rows * keys
    return torch.get_num_threads() * (
        (scores + 2 * rows + rows * shape.head_dim) * shape.sum_bytes + _halved(shape, scores)
    )


def backward_working_bytes(shape: Shape) -> int:
    """Of the backward kernel: scores and their gradient; and one sum a row, counted once: the
    profiler sees one thread's."""
    rows, keys = _tile(shape)
    scores = 2 * rows * keys
    return (
        torch.get_num_threads() * (scores * shape.sum_bytes + _halved(shape, scores))
        + rows * shape.sum_bytes
    )


def _tile(shape: Shape) -> tuple[int, int]:
    """Rows and keys of the scores that a thread holds."""
    rows = next(rows for start, rows in QUERIES if shape.query_length >= start)
    return min(rows, shape.query_length), min(KEYS, shape.key_length)


def _halved(shape: Shape, numbers: int) -> int:
    return numbers * shape.dtype.itemsize if shape.sum_bytes > shape.dtype.itemsize else 0
