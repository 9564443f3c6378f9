"""What gates and delta rules cost, in closed form: operations, bytes and state (see `Cost`)."""

from __future__ import annotations

from attnzoo.engines.engine import Cost, Shape, causal_pairs
from attnzoo.engines.linear.gated.gated_chunks import chunk_of
from attnzoo.engines.linear.gated.tokens import Rule


def cost(rule: Rule, shape: Shape) -> Cost:
    """Cost of one forward pass by the backend `chunked`.

    rule: what a token does to the state
    shape: the sizes of the call; a row is computed at every key, before the first query too
    """
    d, keys, group = shape.head_dim, shape.key_length, shape.heads // shape.kv_heads
    chunk = chunk_of(keys)
    chunks = len(range(0, keys, chunk))
    numbers = shape.batch_size * shape.kv_heads * d * d
    return Cost(
        macs=shape.batch_size
        * shape.kv_heads
        * (chunks * _macs(rule, chunk, d, group) - chunk * d * d),  # nobody reads the last state
        support_macs=2
        * shape.batch_size
        * shape.heads
        * d
        * causal_pairs(shape.query_length, keys),
        elementwise=shape.batch_size * _elementwise(rule, shape, chunk, chunks),
        moved_bytes=shape.input_bytes + shape.query_bytes + _gate_bytes(rule, shape),
        state_elements=numbers,
        state_bytes=numbers * shape.sum_bytes,
    )


def _macs(rule: Rule, chunk: int, d: int, group: int) -> int:
    """Of a chunk of one key head, whose group of query heads computes its rows together."""
    pairs, through_state = chunk * chunk * d, chunk * d * d
    # Products by halves of halves pass over what lies above the diagonal.
    of_keys = chunk * (chunk + 1) // 2 * d if rule.by_channel else pairs
    rows_and_state = group * (of_keys + pairs + through_state) + through_state
    if not rule.delta:
        return rows_and_state
    inverse = chunk * (chunk * chunk - 1) // 3
    return rows_and_state + of_keys + inverse + 2 * pairs + through_state


def _elementwise(rule: Rule, shape: Shape, chunk: int, chunks: int) -> int:
    """Exponentials and roots of one sample."""
    found = (shape.heads + shape.kv_heads) * shape.key_length if rule.l2_norm else 0
    of_chunk = 0
    if rule.gate is not None and not rule.by_channel:
        of_chunk = chunk * chunk + chunk
    elif rule.by_channel:  # since the start, until the end, and to the middle of halves
        of_chunk = chunk * shape.head_dim * ((chunks > 1) + chunk.bit_length())
    return found + shape.kv_heads * chunks * of_chunk


def _gate_bytes(rule: Rule, shape: Shape) -> int:
    """Bytes of log_decay and beta."""
    channels = 0 if rule.gate is None else shape.head_dim if rule.by_channel else 1
    tokens = shape.batch_size * shape.kv_heads * shape.key_length
    return tokens * (channels + rule.delta) * shape.dtype.itemsize
