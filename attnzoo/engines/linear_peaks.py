"""The most that torch's allocator holds in the linear engine, in bytes, by the backend `chunked`, without masks in the call.

What is as long as the sequence is known to the byte. Of one span of tokens it is what stands at the busiest moment, by kinds of tensors;
what is smaller, such as masks and numbers of one chunk, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.engines.engine import Shape
from attnzoo.engines.linear_chunks import CAUSAL_CHUNK, CHUNK, chunks_held, spans
from attnzoo.feature_maps import FeatureMap


@dataclass(frozen=True)
class _Span:
    """Bytes of the tensors of one span. features: of queries and keys; query_features: of queries; regrouped: queries laid out anew where
    several heads share keys; rows: numerators; totals: numerators with their normalisers;
    scores: of rows with their own chunk, weights: of keys in those rows, 0 where all are 1; sums: of keys, one for each chunk."""

    features: int
    query_features: int
    regrouped: int
    rows: int
    totals: int
    scores: int
    weights: int
    sums: int


def forward(feature_map: FeatureMap, shape: Shape) -> int:
    """A forward that does not record."""
    span = _widest(feature_map, shape)
    if not shape.is_causal:  # a chunk of queries, or of keys, with the sums over all keys
        return shape.query_bytes + span.query_features + 3 * span.rows + span.totals + span.sums + span.regrouped
    # Features and what they were made of, scores before and after their mask, sums of each chunk, before each chunk, and as a list
    return shape.query_bytes + 2 * span.features + 2 * span.scores + 3 * span.weights + 3 * span.sums + span.rows


def training(feature_map: FeatureMap, shape: Shape, kept_bytes: int) -> int:
    """A forward that records, and its backward pass. kept_bytes: `Cost.kept_bytes`."""
    span = _widest(feature_map, shape)
    held = kept_bytes - shape.input_bytes + (shape.query_bytes if feature_map.normalizer != "row" else 0)  # the output is there in any case
    held += shape.input_bytes  # gradients of q, k and v
    if not shape.is_causal:  # a chunk's features, their gradient, and what the gradient is made of
        keys = shape.kv_heads / shape.heads
        queried = 2 * span.query_features + 2 * span.rows + 4 * span.totals
        summed = 4 * (span.features - span.query_features) + int(keys * (2 * span.rows + 4 * span.totals))
        return held + span.sums + max(queried, summed)
    scaled = 2 * span.totals + span.weights if span.weights else 0
    return held + 7 * span.features // 2 + 2 * span.scores + 3 * span.sums + 3 * span.rows + 3 * span.totals + scaled


def _widest(feature_map: FeatureMap, shape: Shape) -> _Span:
    width, d, size = feature_map.width(shape.head_dim), shape.head_dim, shape.batch_size * shape.sum_bytes
    if not shape.is_causal:
        tokens = min(CHUNK, max(shape.query_length, shape.key_length))
        chunks, pairs = 1, 0
    else:
        queries = min(shape.query_length, shape.key_length)
        found = spans(queries, chunks_held(width, shape.batch_size, shape.heads, queries, torch.empty(0)))
        tokens, chunks = max(found)
        pairs = tokens * min(CAUSAL_CHUNK, tokens)
    return _Span(
        features=size * (shape.heads + shape.kv_heads) * tokens * width,
        query_features=size * shape.heads * tokens * width,
        regrouped=size * shape.heads * tokens * d if shape.heads > shape.kv_heads else 0,
        rows=size * shape.heads * tokens * d,
        totals=size * shape.heads * tokens * (d + 1),
        scores=size * shape.heads * pairs,
        weights=size * shape.kv_heads * pairs if feature_map.scales_keys else 0,
        sums=size * shape.kv_heads * chunks * width * (d + 1),
    )
