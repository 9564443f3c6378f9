"""What gates and delta rules cost, in closed form: operations, bytes and state (see `Cost`)."""

from __future__ import annotations

from dataclasses import replace

from attnzoo.engines.engine import Cost, Shape, causal_pairs
from attnzoo.engines.linear.gated.gated_chunks import CHUNK, chunk_of
from attnzoo.engines.linear.gated.tokens import Rule


def cost(rule: Rule, shape: Shape, gate_is_constant: bool, largest_chunk: int = CHUNK) -> Cost:
    """Cost of one forward pass by the backend `chunked`.

    rule: what a token does to the state
    shape: the sizes of the call; a row is computed at every key, before the first query too
    gate_is_constant: whether no call brings it
    largest_chunk: tokens of a chunk of a long call
    """
    d, keys, group = shape.head_dim, shape.key_length, shape.heads // shape.kv_heads
    chunk = chunk_of(keys, largest_chunk)
    chunks = len(range(0, keys, chunk))
    unread = (1 + rule.removes) * chunk * d * d  # nobody reads the last state
    numbers = shape.batch_size * shape.kv_heads * d * d
    return Cost(
        macs=shape.batch_size * shape.kv_heads * (chunks * _macs(rule, chunk, d, group) - unread),
        support_macs=2
        * shape.batch_size
        * shape.heads
        * d
        * causal_pairs(shape.query_length, keys),
        elementwise=shape.batch_size * _elementwise(rule, shape, chunk, chunks),
        moved_bytes=shape.input_bytes
        + shape.query_bytes
        + _gate_bytes(rule, shape, gate_is_constant),
        state_elements=numbers,
        state_bytes=numbers * shape.sum_bytes,
    )


def of_short(found: Cost, shape: Shape) -> Cost:
    """The same by the backend `short`, which lays A out for every query head."""
    pairs = shape.batch_size * shape.heads * shape.key_length**2
    return replace(found, macs=2 * pairs * shape.head_dim, elementwise=pairs)


def _macs(rule: Rule, chunk: int, d: int, group: int) -> int:
    """Of a chunk of one key head, whose group of query heads computes its rows together."""
    pairs, through_state = chunk * chunk * d, chunk * d * d
    # Products by halves of halves pass over what lies above the diagonal.
    of_keys = chunk * (chunk + 1) // 2 * d if rule.by_channel else pairs
    if rule.removes:  # what is written and what is removed, one behind the other
        both = 2 * chunk
        inverse = both * (both * both - 1) // 3
        products = (2 * group + 2) * of_keys + both * both * d + group * (2 * pairs)
        return products + inverse + (2 * both + group * chunk) * d * d
    rows_and_state = group * (of_keys + pairs + through_state) + through_state
    if not rule.delta:
        return rows_and_state
    inverse = chunk * (chunk * chunk - 1) // 3
    return rows_and_state + of_keys + inverse + pairs + through_state


def _elementwise(rule: Rule, shape: Shape, chunk: int, chunks: int) -> int:
    """Exponentials and roots of one sample, where no call brings the keys that are removed."""
    normed = shape.heads + shape.kv_heads if rule.l2_norm else 0
    normed += shape.kv_heads if rule.removes else 0
    of_chunk = 0
    if rule.by_channel:  # of blocks of 1, 2, 4 ... tokens, and of the chunk, if it is handed on
        of_chunk = max(1, 2 * chunk - 2 + int(chunks > 1)) * shape.head_dim
    elif rule.gate is not None:
        of_chunk = chunk * chunk + chunk
    return chunks * (normed * chunk + shape.kv_heads * of_chunk)


def _gate_bytes(rule: Rule, shape: Shape, gate_is_constant: bool) -> int:
    """Bytes of the inputs."""
    channels = shape.head_dim if rule.by_channel else 1
    channels = 0 if rule.gate is None or gate_is_constant else channels
    channels += rule.delta + 2 * shape.head_dim * rule.removes
    tokens = shape.batch_size * shape.kv_heads * shape.key_length
    return tokens * channels * shape.dtype.itemsize
