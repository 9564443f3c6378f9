"""Buckets cut into chunks of consecutive keys, and tokens laid out in tiles of one chunk each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.sequences.ordering import running_maximum, search, stable_order

# Numbers of no chunk: of a padded key, and of a query whose bucket holds no key that it may see.
# They are far from all others and each other.
NO_KEY, NO_QUERY = 2**60, 2**61


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


def ranks(sorted_groups: Tensor) -> Tensor:
    """The place of every entry within its run of equal ones, (..., length) int64."""
    index = torch.arange(sorted_groups.shape[-1], device=sorted_groups.device)
    differs = sorted_groups[..., 1:] != sorted_groups[..., :-1]
    begins = torch.cat([torch.ones_like(sorted_groups[..., :1], dtype=torch.bool), differs], -1)
    return index - running_maximum(torch.where(begins, index, 0))


def near(queries: Tensor, keys: Tensor, is_causal: bool) -> Tensor:
    """Whether a key's chunk is the query's or the one before it, or after it where that is allowed:
    (..., queries, keys) bool."""
    ahead = queries[..., :, None] - keys[..., None, :]
    return (ahead >= (0 if is_causal else -1)) & (ahead <= 1)


@dataclass(frozen=True)
class Tiles:
    """Tokens laid out in tiles of one size, all those of a tile from one chunk, in order of
    position.

    at: (..., tiles, size), which token stands in a slot; the number of tokens where none does
    chunk: (..., tiles), NO_KEY where empty
    slot: (..., tokens), where a token stands; tiles · size where nowhere
    """

    at: Tensor
    chunk: Tensor
    slot: Tensor


def lay_out(chunks: Tensor, size: int, tiles: int) -> Tiles:
    """Tiles of the tokens that have a chunk.

    chunks: (..., tokens)
    size: slots of a tile
    tiles: how many are laid out
    """
    tokens = chunks.shape[-1]
    order = stable_order(chunks)
    ordered = chunks.gather(-1, order)
    rank = ranks(ordered) % size
    tile = (rank == 0).cumsum(-1) - 1
    nowhere = ordered >= NO_KEY
    slot, tile = (
        (tile * size + rank).masked_fill(nowhere, tiles * size),
        tile.masked_fill(nowhere, tiles),
    )
    at = order.new_full((*order.shape[:-1], tiles * size + 1), tokens).scatter(-1, slot, order)
    chunk = order.new_full((*order.shape[:-1], tiles + 1), NO_KEY).scatter(-1, tile, ordered)
    return Tiles(
        at[..., :-1].unflatten(-1, (tiles, size)),
        chunk[..., :-1],
        torch.zeros_like(slot).scatter(-1, order, slot),
    )


def most_tiles(tokens: int, groups: int, size: int) -> int:
    """Tiles that hold any `tokens` of at most `groups` groups, when no tile mixes groups."""
    filled = min(tokens, groups)
    return filled + (tokens - filled) // size
