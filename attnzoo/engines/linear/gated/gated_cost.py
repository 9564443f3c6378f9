"""What gates and delta rules cost, in closed form: operations, bytes and state (see `Cost`)."""

from __future__ import annotations

from attnzoo.engines.engine import Cost, Shape, causal_pairs
from attnzoo.engines.linear.gated.gated_chunks import chunk_of
from attnzoo.engines.linear.gated.tokens import Rule


def cost(rule: Rule, shape: Shape) -> Cost:
    """Cost of one forward pass by the backend `chunked`, without gates.

    rule: what a token does to the state
    shape: the sizes of the call; every key that a query sees has a row computed, of those before
        the first query too
    """
    d, keys, group = shape.head_dim, shape.key_length, shape.heads // shape.kv_heads
    chunk = chunk_of(keys)
    chunks = len(range(0, keys, chunk))
    pairs, state = chunk * chunk, d * d
    # Scores and their products with values; rows read from the state before.
    per_chunk = group * (2 * pairs * d + chunk * state) + chunk * state
    if rule.delta:
        inverse = chunk * (chunk * chunk - 1) // 3
        # Overlaps of keys; what the tokens write, and erase; the latter's part of rows and states.
        per_chunk += pairs * d + inverse + 2 * pairs * d
        per_chunk += group * pairs * d + chunk * state + d * state
    numbers = shape.batch_size * shape.kv_heads * state
    seen = causal_pairs(shape.query_length, keys)
    return Cost(
        macs=shape.batch_size * shape.kv_heads * chunks * per_chunk,
        support_macs=2 * shape.batch_size * shape.heads * d * seen,
        elementwise=0,
        moved_bytes=shape.input_bytes + shape.query_bytes,
        state_elements=numbers,
        state_bytes=numbers * shape.sum_bytes,
    )
