"""What the linear engine costs, in closed form (see `Cost`)."""

from __future__ import annotations

import torch

from attnzoo.engines.engine import Cost, Shape, causal_pairs
from attnzoo.engines.linear.chunks import CAUSAL_CHUNK
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.sums import CHUNK


def cost(feature_map: FeatureMap, shape: Shape) -> Cost:
    """Cost of one forward by the backend `chunked` at these sizes, with keys of the usual size."""
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
        writing -= chunks[-1]  # and nobody reads what the last one would add
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
    """Queries that are computed: those before the first key see nothing."""
    return min(shape.query_length, shape.key_length) if shape.is_causal else shape.query_length


def _causal_chunks(queries: int) -> list[int]:
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
        early = (
            keys - queries if shape.is_causal else keys
        )  # keys that are summed before any query of a chunk of its own
        per_kv_head += early + max(
            0, -(-early // CHUNK) - 1
        )  # one weight a key, and one factor for what is summed already
        if shape.is_causal:
            chunks = _causal_chunks(queries)
            per_kv_head += sum(
                size * size for size in chunks
            )  # weights between the tokens of a chunk
            per_kv_head += (
                queries if early else queries - chunks[0]
            )  # what the sums are worth to a row
            per_kv_head += (
                queries - chunks[-1] + max(0, len(chunks) - (1 if early else 2))
            )  # and the sums, all but the last chunk's
    return shape.heads * per_head + shape.kv_heads * per_kv_head
