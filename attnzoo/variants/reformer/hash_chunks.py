"""Buckets cut into chunks of consecutive keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.engines.sparse.selected.grouped_rows import NOWHERE, ranks
from attnzoo.sequences.ordering import search

# Numbers of no chunk: of a padded key, and of a query whose bucket holds no key that it may see.
# They are far from all others and each other.
NO_KEY, NO_QUERY = NOWHERE, 2 * NOWHERE


@dataclass(frozen=True)
class Chunks:
    """Which chunk every token stands in, in each hash round. The chunks of a bucket are numbered
    one after the other, with a gap before the next bucket.

    queries: (..., num_hashes, queries) int64
    keys: (..., num_hashes, keys) int64
    """

    queries: Tensor
    keys: Tensor


def number_chunks(
    queries: Tensor,
    keys: Tensor,
    positions: Tensor,
    key_mask: Tensor | None,
    size: int,
    is_causal: bool,
) -> Chunks:
    """Every bucket in chunks of `size` consecutive real keys. A query stands in the chunk of the
    last key of its bucket at or before it; before all keys of its bucket in the first chunk or,
    when causal, in none. A key's chunk depends on no later token.

    queries: (..., num_hashes, queries), buckets
    keys: (..., num_hashes, keys), buckets
    positions: (queries,), where a query stands among the keys; negative before the first
    key_mask: broadcastable to keys
    size: keys of a chunk
    """
    length = keys.shape[-1]
    place = torch.arange(1, length + 1, device=keys.device)
    ordered = keys * (length + 1) + place
    if key_mask is not None:
        ordered = ordered.masked_fill(~key_mask, NO_KEY)
    ordered, order = ordered.sort(-1)
    buckets = ordered // (length + 1)
    numbers = (buckets * (length + 2) + ranks(buckets) // size).masked_fill(
        ordered == NO_KEY, NO_KEY
    )
    wanted = queries * (length + 1) + (positions + 1).clamp(min=0)
    # The first key behind it in its bucket, or of a later bucket.
    after = search(ordered, wanted, right=True)
    last = _chunk_at(after - 1, queries, buckets, numbers)
    if not is_causal:
        last = torch.where(last == NO_QUERY, _chunk_at(after, queries, buckets, numbers), last)
    return Chunks(last, torch.zeros_like(numbers).scatter(-1, order, numbers))


def _chunk_at(index: Tensor, wanted: Tensor, buckets: Tensor, numbers: Tensor) -> Tensor:
    """The chunk of the key at `index` in sorted order, where that key is of the wanted bucket."""
    inside = index.clamp(0, buckets.shape[-1] - 1)
    found = (index == inside) & (buckets.gather(-1, inside) == wanted)
    return numbers.gather(-1, inside).masked_fill(~found, NO_QUERY)


def near(queries: Tensor, keys: Tensor, is_causal: bool) -> Tensor:
    """Whether a key's chunk is the query's or the one before it, or after it where that is allowed:
    (..., queries, keys) bool."""
    ahead = queries[..., :, None] - keys[..., None, :]
    return (ahead >= (0 if is_causal else -1)) & (ahead <= 1)
