"""The most that torch's allocator holds in the linear engine, in bytes, by the backend `chunked`,
without masks in the call.

What is as long as the sequence is known to the byte. Of one span of tokens it is what stands at the
busiest moment, by kinds of tensors; what is smaller, such as masks and numbers of one chunk, is
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from attnzoo.engines.engine import Shape
from attnzoo.engines.linear.bidirectional import slab_sizes
from attnzoo.engines.linear.chunks import CAUSAL_CHUNK, chunks_held, spans
from attnzoo.engines.linear.feature_maps import FeatureMap


@dataclass(frozen=True)
class _Span:
    """Bytes of the tensors of one span. features: of queries and keys; held: those of them that
    stay; query_features: of queries; divisors: of those features, 0 where they have none;
    regrouped: queries laid out anew where several heads share keys, and causal values with their
    ones;
    rows: quotients; totals: numerators with their normalisers, if they have any;
    scores: of rows with their own chunk, weights: of keys in those rows, 0 where they are few or
    all 1; sums: of keys, one for each chunk."""

    features: int
    held: int
    query_features: int
    divisors: int
    regrouped: int
    rows: int
    totals: int
    scores: int
    weights: int
    sums: int

    def left_over(self) -> int:
        """Of a causal span that has been read."""
        return (
            self.held
            + self.divisors
            + self.regrouped
            + self.scores
            + self.weights
            + self.sums
            + self.rows
        )


def forward(feature_map: FeatureMap, shape: Shape) -> int:
    """A forward that does not record."""
    if not shape.is_causal:
        slab, whole = _slab(feature_map, shape)
        direct = (
            whole
            and shape.heads == shape.kv_heads
            and shape.dtype.itemsize == shape.sum_bytes
            and feature_map.normalizer != "row"
        )
        read = max(
            int(feature_map.while_made * slab.query_features),
            slab.query_features + (0 if direct else slab.rows),
        )
        return (
            shape.query_bytes
            + _divisor_bytes(feature_map, shape)
            + _sum_bytes(feature_map, shape)
            + slab.regrouped
            + read
        )
    busiest = max(
        max(before.left_over() + _built(span), before.rows + _read(span))
        for before, span in _neighbours(feature_map, shape)
    )
    return shape.query_bytes + busiest


def training(feature_map: FeatureMap, shape: Shape, kept_bytes: int) -> int:
    """A forward that records, and its backward pass. kept_bytes: `Cost.kept_bytes`."""
    held = (
        kept_bytes
        - shape.input_bytes
        + (shape.query_bytes if feature_map.normalizer != "row" else 0)
    )  # the output is there in any case
    held += shape.input_bytes  # gradients of q, k and v
    if (
        not shape.is_causal
    ):  # features, their gradient, and what the gradient is made of, of queries and then of keys
        slab, _ = _slab(feature_map, shape)
        of_keys = slab.features * shape.kv_heads // (shape.heads + shape.kv_heads)
        queried = (
            slab.regrouped
            + slab.query_features
            + slab.features
            - of_keys
            + (slab.rows if feature_map.normalizer == "row" else 0)
        )
        summed = (of_keys if slab.held else 0) + of_keys
        summed += (
            shape.kv_heads
            * (slab.rows + (3 * slab.totals if feature_map.scales_keys else 0))
            // shape.heads
        )
        return held + slab.sums + max(queried, summed)
    # As forward, with the gradients of features and rows: of values, of numerators, and of
    # numerators with their normalisers
    busiest = 0
    for before, span in _neighbours(feature_map, shape):
        sent = (
            3 * span.features // 2
            + 3 * span.rows
            + (5 if feature_map.scales_keys else 3) * span.totals
        )
        busiest = max(busiest, before.left_over() + _built(span) - span.weights + sent)
    return held + busiest


def _slab(feature_map: FeatureMap, shape: Shape) -> tuple[_Span, bool]:
    """What is computed at a time where every query sees every key, and whether it is whole
    heads."""
    length, group = max(1, shape.query_length, shape.key_length), shape.heads // shape.kv_heads
    samples, heads, tokens = slab_sizes(
        feature_map.width(shape.head_dim), shape.kv_heads, group, length, torch.get_num_threads()
    )
    part = replace(
        shape, batch_size=min(samples, shape.batch_size), heads=heads * group, kv_heads=heads
    )
    return _span(feature_map, part, min(tokens, length), 1), tokens >= length


def _sum_bytes(feature_map: FeatureMap, shape: Shape) -> int:
    return (
        shape.sum_bytes
        * shape.batch_size
        * shape.kv_heads
        * feature_map.width(shape.head_dim)
        * (shape.head_dim + 1)
    )


def _divisor_bytes(feature_map: FeatureMap, shape: Shape) -> int:
    return (
        shape.sum_bytes * shape.batch_size * shape.heads * shape.query_length
        if feature_map.normalizer == "row"
        else 0
    )


def _built(span: _Span) -> int:
    """Scores before and after their weights; sums that each chunk adds, sums before each chunk."""
    return (
        span.features
        + span.divisors
        + span.regrouped
        + span.scores
        + 2 * span.weights
        + 2 * span.sums
    )


def _read(span: _Span) -> int:
    """Numerators of a row's own chunk, where keys have weights those of what lies before it and
    both together, and the quotients."""
    totals = 3 * span.totals if span.weights else span.totals + span.rows
    return (
        span.features
        + span.divisors
        + span.regrouped
        + span.scores
        + span.weights
        + span.sums
        + totals
    )


def _neighbours(feature_map: FeatureMap, shape: Shape) -> list[tuple[_Span, _Span]]:
    """Each causal span with the one that is computed before it, which is let go only when the next
    stands."""
    queries = min(shape.query_length, shape.key_length)
    together = chunks_held(
        feature_map.width(shape.head_dim), shape.batch_size, shape.heads, queries, torch.empty(0)
    )
    found = [
        _span(feature_map, shape, 0, 0),
        *(_span(feature_map, shape, *one) for one in spans(queries, together)),
    ]
    return list(pairwise(found))


def _span(feature_map: FeatureMap, shape: Shape, tokens: int, chunks: int) -> _Span:
    width, d, size = (
        feature_map.width(shape.head_dim),
        shape.head_dim,
        shape.batch_size * shape.sum_bytes,
    )
    pairs = tokens * min(CAUSAL_CHUNK, tokens)
    return _Span(
        features=size * (shape.heads + shape.kv_heads) * tokens * width,
        held=0 if feature_map.is_view else size * (shape.heads + shape.kv_heads) * tokens * width,
        query_features=0 if feature_map.is_view else size * shape.heads * tokens * width,
        divisors=size * shape.kv_heads * tokens * width
        if shape.is_causal and feature_map.normalizer == "feature"
        else 0,
        regrouped=(size * shape.heads * tokens * d if shape.heads > shape.kv_heads else 0)
        + (size * shape.kv_heads * tokens * (d + 1) if shape.is_causal else 0),
        rows=size * shape.heads * tokens * d,
        totals=size * shape.heads * tokens * (d + 1 if feature_map.normalizer == "row" else d),
        scores=size * shape.heads * pairs,
        weights=size * shape.kv_heads * pairs if feature_map.scales_keys else 0,
        sums=size * shape.kv_heads * chunks * width * (d + 1),
    )
