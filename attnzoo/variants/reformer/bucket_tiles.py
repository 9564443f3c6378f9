"""Backend `chunked`: tokens sorted by bucket into tiles, one product for each tile, and hash rounds
merged as a set of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.engine import (
    accumulation_dtype,
)
from attnzoo.engines.exponential import LOG2_E
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.sparse.selected.grouped_rows import (
    PartialSoftmax,
    heads_of,
    lay_out,
    most_tiles,
    rows_of,
    select,
    take,
)
from attnzoo.sequences.ordering import search
from attnzoo.variants.reformer.angular_hash import AngularHash
from attnzoo.variants.reformer.bucket_rows import (
    chunks_of,
    own_is_real,
    own_of,
    positions_of,
    with_unit_keys,
)
from attnzoo.variants.reformer.hash_chunks import NO_KEY, NO_QUERY, Chunks, near

SCORES = 2**24  # of tiles, held at a time: those of all tiles would be n · chunk_size


class Buckets(Protocol):
    """What is read of the engine: `BucketSoftmax`."""

    hashing: AngularHash
    chunk_size: int
    share_qk: bool

    def scale_of(self, q: Tensor) -> float: ...


@dataclass(frozen=True)
class Sizes:
    """How many tiles are laid out, whatever falls into which bucket.

    queries: rows of a query tile
    query_tiles: how many
    keys: slots of a key tile
    key_tiles: how many
    seen_tiles: key tiles that a query tile is multiplied with
    """

    queries: int
    query_tiles: int
    keys: int
    key_tiles: int
    seen_tiles: int

    def tiles_at_a_time(self, like: Tensor) -> int:
        """Query tiles whose scores are held at a time.

        like: (heads, ...), on the device where they are
        """
        scores = like.shape[0] * self.queries * self.seen_tiles * self.keys
        return at_a_time(self.query_tiles, scores, SCORES, like)

    @classmethod
    def of(
        cls, rows: int, key_length: int, num_buckets: int, chunk_size: int, is_causal: bool
    ) -> Sizes:
        key_tiles = most_tiles(key_length, num_buckets, chunk_size)
        # As many as there are for each tile of keys: more would leave slots empty.
        queries = min(chunk_size, -(-rows // key_tiles))
        return cls(
            queries,
            most_tiles(rows, key_tiles, queries),
            min(chunk_size, key_length),
            key_tiles,
            2 if is_causal else 3,
        )


def attend(engine: Buckets, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype."""
    dtype = accumulation_dtype(call.q.dtype)
    chunks = chunks_of(engine.hashing, engine.chunk_size, call)
    call = with_unit_keys(call) if engine.share_qk else call
    scale = engine.scale_of(call.q) * LOG2_E  # weights are powers of 2, the fastest on a CPU
    q, k, v = (
        rows_of(call.q, call).to(dtype) * scale,
        call.k.flatten(0, 1).to(dtype),
        call.v.flatten(0, 1).to(dtype),
    )
    is_real, own_value = own_is_real(call), own_of(v, call)
    found = _own_part(
        q,
        own_of(k, call),
        own_value,
        torch.zeros_like(is_real) if engine.share_qk else is_real,
    )
    sizes = Sizes.of(
        int(q.shape[1]),
        int(call.key_length),
        engine.hashing.num_buckets,
        engine.chunk_size,
        call.is_causal,
    )
    compute = partial(
        _round, chunks=chunks, positions=positions_of(call), sizes=sizes, is_causal=call.is_causal
    )
    if torch.is_grad_enabled() and only_autograd_looks(q, k, v):  # the tiles of one round at a time
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    for hash_round in range(engine.hashing.num_hashes):
        found = found.with_more(compute(hash_round, q, k, v))
    alone = found.total == 0
    out = torch.where(alone & is_real, own_value, found.out) if engine.share_qk else found.out
    return heads_of(out / found.total.masked_fill(alone, 1.0), call).to(call.q.dtype)


def _own_part(q: Tensor, own_key: Tensor, own_value: Tensor, seen: Tensor) -> PartialSoftmax:
    """Each row's own key, where it is seen."""
    score = (q * own_key).sum(-1, keepdim=True).masked_fill(~seen, torch.finfo(q.dtype).min)
    largest = score.detach()
    total = (score - largest).exp2().masked_fill(~seen, 0.0)
    return PartialSoftmax(largest, total, own_value * total)


def _round(
    hash_round: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Chunks,
    positions: Tensor,
    sizes: Sizes,
    is_causal: bool,
) -> PartialSoftmax:
    """The part of every row over the keys that it sees in this hash round and in none before it,
    without its own.

    q: (heads, rows, head_dim), scaled
    k, v: (heads, keys, d)
    positions: (rows,), where the rows stand among the keys
    """
    rows = lay_out(chunks.queries[:, hash_round], sizes.queries, sizes.query_tiles)
    keys = lay_out(chunks.keys[:, hash_round], sizes.keys, sizes.key_tiles)
    neighbours = torch.arange(-1, sizes.seen_tiles - 1, device=q.device)
    tiles = search(keys.group, rows.group)[..., None] + neighbours
    # Beyond either end stands one more tile, which is empty.
    tiles = tiles.where((tiles >= 0) & (tiles < sizes.key_tiles), sizes.key_tiles)
    key_at = F.pad(keys.at, (0, 0, 0, 1), value=k.shape[1])
    weigh = partial(_weigh, hash_round, chunks=chunks, positions=positions, is_causal=is_causal)
    together = sizes.tiles_at_a_time(q)
    if together < sizes.query_tiles and torch.is_grad_enabled() and only_autograd_looks(q, k, v):
        # Some tiles of the round at a time.
        weigh = partial(checkpoint, weigh, use_reentrant=False, preserve_rng_state=False)
    parts = [
        weigh(q, k, v, row_at, select(key_at, some).flatten(2))
        for row_at, some in zip(rows.at.split(together, 1), tiles.split(together, 1), strict=True)
    ]
    whole = (
        parts[0] if len(parts) == 1 else tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
    )
    del parts  # before copies of the whole are made
    largest, total, out = (x.flatten(1, 2) for x in whole)
    return PartialSoftmax(largest, total, out).at(rows.slot)


def _weigh(
    hash_round: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_at: Tensor,
    key_at: Tensor,
    *,
    chunks: Chunks,
    positions: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score, sum of weights and numerators of the rows of some tiles, (heads, tiles, rows,
    1 or d).

    row_at: (heads, tiles, rows), which rows stand in the tiles
    key_at: (heads, tiles, keys), which keys they are multiplied with
    """
    row_position = positions[:, None].expand(q.shape[0], -1, -1)
    key_position = torch.arange(k.shape[1], device=q.device)[:, None].expand(k.shape[0], -1, -1)
    distance = take(row_position, row_at) - take(key_position, key_at).mT
    seen = distance > 0 if is_causal else distance != 0
    for other in range(hash_round + 1):
        of_row = take(chunks.queries[:, other, :, None], row_at, NO_QUERY)
        of_key = take(chunks.keys[:, other, :, None], key_at, NO_KEY)
        both = near(of_row.squeeze(-1), of_key.squeeze(-1), is_causal)
        seen = seen & (both if other == hash_round else ~both)
    scores = (take(q, row_at) @ take(k, key_at).mT).masked_fill(~seen, float("-inf"))
    found = PartialSoftmax.of(scores, take(v, key_at))
    return found.largest, found.total, found.out
