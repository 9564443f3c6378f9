"""What the linear engine costs, in closed form: operations, bytes and state (see `Cost`)."""

from __future__ import annotations

import torch

from attnzoo.engines.engine import Cost, Shape, causal_pairs
from attnzoo.engines.linear.causal.chunks import CAUSAL_CHUNK, SHORT
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.sums import CHUNK


def cost(feature_map: FeatureMap, shape: Shape) -> Cost:
    """Cost of one forward pass by the backend `chunked`.

    feature_map: the φ of queries and keys; keys are taken to be of the usual size, for which it
        may have a cheaper form (`FeatureMap.for_keys`)
    shape: the sizes of the call
    """
    feature_map = feature_map.for_keys(torch.empty(0, device="meta"))
    width, d, keys, queries = (
        feature_map.width(shape.head_dim),
        shape.head_dim,
        shape.key_length,
        _queries(shape),
    )
    reading, writing = queries, keys  # tokens that read the sums, tokens that are summed
    per_head = per_kv_head = 0
    row = d + 1 if feature_map.normalizer == "row" else d  # a row and its normaliser
    if shape.is_causal:
        chunks = _causal_chunks(queries)
        local_pairs = sum(size * size for size in chunks)
        per_head += local_pairs * (width + row)
        if feature_map.normalizer == "feature":
            per_kv_head += local_pairs * width
        if keys == queries:
            reading -= chunks[0]  # nothing lies behind the first chunk
        writing -= chunks[-1]  # and no row reads what the last one would add
    features, sums = feature_map.macs(d), width * (d + 1)
    per_head += queries * features + reading * width * row
    per_kv_head += keys * features + writing * sums
    if not feature_map.weighs_keys:  # before the chunks the normaliser is then a plain sum
        per_kv_head -= (keys - queries if shape.is_causal else keys) * width
    pairs = causal_pairs(shape.query_length, keys) if shape.is_causal else shape.query_length * keys
    state = shape.batch_size * shape.kv_heads * sums
    return Cost(
        macs=shape.batch_size * (shape.heads * per_head + shape.kv_heads * per_kv_head),
        support_macs=2 * shape.batch_size * shape.heads * d * pairs,
        elementwise=shape.batch_size * _elementwise(feature_map, shape),
        moved_bytes=shape.input_bytes
        + shape.query_bytes
        + sum(buffer.nbytes for buffer in feature_map.buffers()),
        state_elements=state,
        state_bytes=state * shape.sum_bytes,
    )


def _queries(shape: Shape) -> int:
    """How many queries are computed: causal ones before the first key see nothing."""
    return min(shape.query_length, shape.key_length) if shape.is_causal else shape.query_length


def _causal_chunks(queries: int) -> list[int]:
    """Number of tokens of each causal chunk."""
    if queries <= SHORT:
        return [queries]
    return [min(CAUSAL_CHUNK, queries - start) for start in range(0, queries, CAUSAL_CHUNK)]


def _elementwise(feature_map: FeatureMap, shape: Shape) -> int:
    """Exponentials and divisions of the chunked backend for one sample."""
    d, width, keys, queries = (
        shape.head_dim,
        feature_map.width(shape.head_dim),
        shape.key_length,
        _queries(shape),
    )
    per_head = queries * feature_map.query_elementwise(d)
    per_kv_head = keys * feature_map.key_elementwise(d)
    if feature_map.normalizer == "row":
        per_head += queries * d
    if feature_map.normalizer == "feature" and shape.is_causal:
        per_head += queries * width
    elif feature_map.normalizer == "feature":
        per_kv_head += width * d
    if feature_map.scales_keys:
        # Keys that are summed before the first query reads. Each takes one weight, and each part of
        # CHUNK keys but the first takes one factor for the sums so far.
        early = keys - queries if shape.is_causal else keys
        per_kv_head += early + max(0, -(-early // CHUNK) - 1)
        if shape.is_causal:
            chunks = _causal_chunks(queries)
            # Weights between the tokens of a chunk.
            per_kv_head += sum(size * size for size in chunks)
            # The weight of the earlier sums in each row that has any before its chunk.
            per_kv_head += queries if early else queries - chunks[0]
            # For the sums after each chunk but the last: a weight for each of its keys, and a
            # factor for the sums before it where there are any.
            per_kv_head += queries - chunks[-1] + max(0, len(chunks) - (1 if early else 2))
    return shape.heads * per_head + shape.kv_heads * per_kv_head
