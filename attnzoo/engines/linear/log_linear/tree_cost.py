"""What log-linear attention costs, in closed form (see `Cost`)."""

from __future__ import annotations

from dataclasses import replace

from attnzoo.engines.engine import Cost, Shape
from attnzoo.engines.linear.gated import gated_cost
from attnzoo.engines.linear.gated.gated_chunks import chunk_of
from attnzoo.engines.linear.gated.tokens import Rule
from attnzoo.engines.linear.log_linear.tree import buckets_of, levels_of
from attnzoo.engines.linear.log_linear.tree_chunks import CHUNK


def cost(rule: Rule, shape: Shape) -> Cost:
    """Cost of one forward pass by the backend `open`.

    rule: what a token does to every bucket
    shape: the sizes of the call; a row is computed at every key, before the first query too
    """
    one_state = gated_cost.cost(rule, shape, False, CHUNK)
    chunk = chunk_of(shape.key_length, CHUNK)
    levels = shape.batch_size * shape.heads * shape.query_length * levels_of(shape.key_length)
    unread = shape.batch_size * shape.kv_heads * chunk if chunk >= shape.key_length else 0
    now, later = (buckets_of(shape.key_length + more) for more in (0, 1))
    return replace(
        one_state,
        macs=shape.batch_size * shape.kv_heads * _macs(rule, shape),
        elementwise=one_state.elementwise - unread,
        moved_bytes=one_state.moved_bytes + levels * shape.dtype.itemsize,
        state_elements=one_state.state_elements * now,
        state_bytes=one_state.state_bytes * now,
        state_growth=one_state.state_bytes * (later - now),
    )


def _macs(rule: Rule, shape: Shape) -> int:
    """Of one key head, whose group of query heads computes its rows together."""
    d, keys, group = shape.head_dim, shape.key_length, shape.heads // shape.kv_heads
    chunk = chunk_of(keys, CHUNK)
    chunks = len(range(0, keys, chunk))
    rows, state = group * chunk, chunk * d * d
    of_chunk = 2 * rows * chunk * d
    if rule.delta:
        of_chunk += chunk * chunk * d + chunk * (chunk * chunk - 1) // 3 + rows * chunk * chunk
    if chunks == 1:
        return of_chunk
    passed = 0
    if rule.delta:
        of_chunk += (2 * chunk + rows) * chunk * d
        passed = 2 * buckets_before(chunks - 1) * state
    read = group * buckets_before(chunks) * state
    return chunks * of_chunk + (chunks - 1) * state + read + passed


def buckets_before(chunks: int) -> int:
    """How many buckets stand before each of so many chunks, in all: the bits of 0 to chunks - 1."""
    found = 0
    for bit in range(chunks.bit_length()):
        period = 2 << bit
        found += chunks // period * (1 << bit) + max(0, chunks % period - (1 << bit))
    return found
