"""Softmax over the keys that hash to a query's bucket: sorted into tiles, one product a tile, hash
rounds merged as a set of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.arguments import check_positive
from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.engine import (
    Backend,
    Cost,
    Shape,
    accumulation_dtype,
    causal_pairs,
    never_refuses,
)
from attnzoo.engines.exponential import LOG2_E
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.softmax.reference import reference, weights_of
from attnzoo.engines.softmax.softmax import Softmax, softmax_cost
from attnzoo.ordering import search
from attnzoo.variants.reformer.angular_hash import (
    NO_KEY,
    NO_QUERY,
    AngularHash,
    Chunks,
    lay_out,
    most_tiles,
    near,
    number_chunks,
)

SCORES = 2**24  # of tiles, held at a time: those of all tiles would be n · chunk_size


class BucketSoftmax(Softmax):
    """Query i sees the keys of its bucket in its own and the neighbouring chunks, in any hash
    round, and the key at its own position.

    share_qk: keys are queries: they are scaled to length 1, and a query sees its own only when it
    sees nothing else.
    """

    def __init__(
        self, hashing: AngularHash, chunk_size: int, *, share_qk: bool, scale: float | None
    ) -> None:
        super().__init__(1.0 if share_qk and scale is None else scale)
        self.hashing = hashing
        self.chunk_size, self.share_qk = check_positive("chunk_size", chunk_size), share_qk

    def support(self, call: Call) -> Tensor:
        """Which keys every query sees, (batch, heads, query_length, key_length) bool: memory is
        quadratic in the length."""
        chunks = _number(self, call)
        distance = _positions(call)[:, None] - torch.arange(call.key_length, device=call.q.device)
        own = (distance == 0) & _own_is_real(call)
        seen = torch.zeros_like(own)
        for of_query, of_key in zip(chunks.queries.unbind(-2), chunks.keys.unbind(-2), strict=True):
            seen = seen | near(of_query, of_key, call.is_causal)
        seen = seen & (distance > 0 if call.is_causal else distance != 0)
        return _heads(seen | (own & ~seen.any(-1, keepdim=True) if self.share_qk else own), call)

    def matrix(self, call: Call) -> Tensor:
        return weights_of(self, _prepared(self, call), self.support(call))

    def cost(self, shape: Shape) -> Cost:
        rows = shape.query_length * (shape.heads // shape.kv_heads)
        sizes = Sizes.of(
            rows, shape.key_length, self.hashing.num_buckets, self.chunk_size, shape.is_causal
        )
        heads, rounds = shape.batch_size * shape.kv_heads, self.hashing.num_hashes
        scores = rounds * sizes.query_tiles * sizes.queries * sizes.seen_tiles * sizes.keys
        most = 1 + rounds * self.chunk_size * sizes.seen_tiles
        support = shape.query_length * min(most, shape.key_length)
        if shape.is_causal:
            hidden = (
                causal_pairs(shape.query_length, shape.key_length - most)
                if shape.key_length > most
                else 0
            )
            support = causal_pairs(shape.query_length, shape.key_length) - hidden
        cost = softmax_cost(shape, shape.kv_heads * scores, shape.heads * support, None)
        merging = heads * rows * (2 * rounds + shape.head_dim + (0 if self.share_qk else 1))
        return replace(
            cost,
            macs=cost.macs + self.hashing.macs(heads * (rows + shape.key_length)),
            elementwise=heads * scores
            + merging
            + (heads * shape.key_length if self.share_qk else 0),
            moved_bytes=cost.moved_bytes + self.hashing.rotations.nbytes,
        )


@dataclass(frozen=True)
class Sizes:
    """How many tiles are laid out, whatever falls into which bucket: query_tiles of `queries` rows,
    key_tiles of `keys` slots.
    seen_tiles: key tiles that a query tile is multiplied with."""

    queries: int
    query_tiles: int
    keys: int
    key_tiles: int
    seen_tiles: int

    def tiles_at_a_time(self, like: Tensor) -> int:
        """Tiles of rows whose scores are held at a time. like: (heads, ...), on the device where
        they are."""
        scores = like.shape[0] * self.queries * self.seen_tiles * self.keys
        return at_a_time(self.query_tiles, scores, SCORES, like)

    @classmethod
    def of(
        cls, rows: int, key_length: int, num_buckets: int, chunk_size: int, is_causal: bool
    ) -> Sizes:
        key_tiles = most_tiles(key_length, num_buckets, chunk_size)
        queries = min(
            chunk_size, -(-rows // key_tiles)
        )  # as many as there are for each tile of keys: more would leave slots empty
        return cls(
            queries,
            most_tiles(rows, key_tiles, queries),
            min(chunk_size, key_length),
            key_tiles,
            2 if is_causal else 3,
        )


def _number(engine: BucketSoftmax, call: Call) -> Chunks:
    """Chunks of every key head's keys and of the rows that share it, (batch · kv_heads, num_hashes,
    ...)."""
    keys = engine.hashing(call.k.flatten(0, 1))
    mask = (
        None
        if call.key_mask is None
        else call.key_mask.repeat_interleave(call.k.shape[1], 0)[:, None]
    )
    return number_chunks(
        engine.hashing(_rows(call.q, call)),
        keys,
        _positions(call),
        mask,
        engine.chunk_size,
        call.is_causal,
    )


def _rows(x: Tensor, call: Call) -> Tensor:
    """(batch, heads, query_length, d) -> (batch · kv_heads, query_length · group, d): heads that
    share keys in turn at every position."""
    return x.unflatten(1, (-1, call.group)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _heads(x: Tensor, call: Call) -> Tensor:
    """The way back from `_rows`."""
    return (
        x.unflatten(0, call.k.shape[:2])
        .unflatten(2, (-1, call.group))
        .transpose(2, 3)
        .flatten(1, 2)
    )


def _positions(call: Call) -> Tensor:
    """Of the rows."""
    return torch.arange(call.offset, call.key_length, device=call.q.device).repeat_interleave(
        call.group
    )


def _own(x: Tensor, call: Call) -> Tensor:
    """What stands at the position of every row, 0 where there is none: (..., key_length, d) ->
    (..., query_length · group, d)."""
    return F.pad(x, (0, 0, max(0, -call.offset), 0))[
        ..., max(0, call.offset) :, :
    ].repeat_interleave(call.group, -2)


def _own_is_real(call: Call) -> Tensor:
    """Whether a key stands at the position of a row, (batch · kv_heads or 1, query_length · group,
    1)."""
    if call.key_mask is None:
        return (_positions(call) >= 0)[None, :, None]
    real = _own(call.key_mask[..., None].to(torch.uint8), call) > 0
    return real.repeat_interleave(call.k.shape[1], 0)


def _prepared(engine: BucketSoftmax, call: Call) -> Call:
    """Keys that are queries scaled to length 1; a key of length 0 stays."""
    if not engine.share_qk:
        return call
    k = call.k.to(accumulation_dtype(call.k.dtype))
    square = k.square().sum(-1, keepdim=True)
    return replace(call, k=k * square.clamp(min=torch.finfo(k.dtype).tiny).rsqrt())


@dataclass(frozen=True)
class Part:
    """A softmax over some of a row's keys, not yet divided by its sum: weights relative to
    2^largest. (heads, rows, 1 or value_dim)."""

    largest: Tensor
    total: Tensor
    out: Tensor

    def with_more(self, other: Part) -> Part:
        """Over the keys of both; they share none."""
        largest = self.largest.maximum(other.largest)
        mine, others = (self.largest - largest).exp2(), (other.largest - largest).exp2()
        return Part(
            largest, self.total * mine + other.total * others, self.out * mine + other.out * others
        )


def attend(engine: BucketSoftmax, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype."""
    dtype = accumulation_dtype(call.q.dtype)
    chunks, call = _number(engine, call), _prepared(engine, call)
    scale = engine.scale_of(call.q) * LOG2_E  # weights are powers of 2, the fastest on a CPU
    q, k, v = (
        _rows(call.q, call).to(dtype) * scale,
        call.k.flatten(0, 1).to(dtype),
        call.v.flatten(0, 1).to(dtype),
    )
    own_is_real, own_value = _own_is_real(call), _own(v, call)
    found = _own_part(
        q,
        _own(k, call),
        own_value,
        torch.zeros_like(own_is_real) if engine.share_qk else own_is_real,
    )
    sizes = Sizes.of(
        int(q.shape[1]),
        int(call.key_length),
        engine.hashing.num_buckets,
        engine.chunk_size,
        call.is_causal,
    )
    compute = partial(
        _round, chunks=chunks, positions=_positions(call), sizes=sizes, is_causal=call.is_causal
    )
    if torch.is_grad_enabled() and only_autograd_looks(q, k, v):  # the tiles of one round at a time
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    for hash_round in range(engine.hashing.num_hashes):
        found = found.with_more(compute(hash_round, q, k, v))
    alone = found.total == 0
    out = torch.where(alone & own_is_real, own_value, found.out) if engine.share_qk else found.out
    return _heads(out / found.total.masked_fill(alone, 1.0), call).to(call.q.dtype)


def _own_part(q: Tensor, own_key: Tensor, own_value: Tensor, seen: Tensor) -> Part:
    """Each row's own key, where it is seen."""
    score = (q * own_key).sum(-1, keepdim=True).masked_fill(~seen, torch.finfo(q.dtype).min)
    largest = score.detach()
    total = (score - largest).exp2().masked_fill(~seen, 0.0)
    return Part(largest, total, own_value * total)


def _round(
    hash_round: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Chunks,
    positions: Tensor,
    sizes: Sizes,
    is_causal: bool,
) -> Part:
    """The keys that a row sees in this hash round and in none before it, its own left out. q:
    scaled."""
    rows = lay_out(chunks.queries[:, hash_round], sizes.queries, sizes.query_tiles)
    keys = lay_out(chunks.keys[:, hash_round], sizes.keys, sizes.key_tiles)
    neighbours = torch.arange(-1, sizes.seen_tiles - 1, device=q.device)
    tiles = search(keys.chunk, rows.chunk)[..., None] + neighbours
    tiles = tiles.where(
        (tiles >= 0) & (tiles < sizes.key_tiles), sizes.key_tiles
    )  # one more tile, which is empty
    key_at = F.pad(keys.at, (0, 0, 0, 1), value=k.shape[1])
    weigh = partial(_weigh, hash_round, chunks=chunks, positions=positions, is_causal=is_causal)
    together = sizes.tiles_at_a_time(q)
    if together < sizes.query_tiles and torch.is_grad_enabled() and only_autograd_looks(q, k, v):
        weigh = partial(
            checkpoint, weigh, use_reentrant=False, preserve_rng_state=False
        )  # some tiles of it at a time
    parts = [
        weigh(q, k, v, row_at, _select(key_at, some).flatten(2))
        for row_at, some in zip(rows.at.split(together, 1), tiles.split(together, 1), strict=True)
    ]
    lowest = torch.finfo(q.dtype).min
    whole = (
        parts[0] if len(parts) == 1 else tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
    )
    del parts  # before copies of the whole are made
    largest, total, out = (x.flatten(1, 2) for x in whole)
    return Part(_take(largest, rows.slot, lowest), _take(total, rows.slot), _take(out, rows.slot))


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

    row_at: (heads, tiles, rows), which rows stand in the tiles; key_at: (heads, tiles, keys), which
    keys they are multiplied with.
    """
    row_position = positions[:, None].expand(q.shape[0], -1, -1)
    key_position = torch.arange(k.shape[1], device=q.device)[:, None].expand(k.shape[0], -1, -1)
    distance = _take(row_position, row_at) - _take(key_position, key_at).mT
    seen = distance > 0 if is_causal else distance != 0
    for other in range(hash_round + 1):
        of_row = _take(chunks.queries[:, other, :, None], row_at, NO_QUERY)
        of_key = _take(chunks.keys[:, other, :, None], key_at, NO_KEY)
        both = near(of_row.squeeze(-1), of_key.squeeze(-1), is_causal)
        seen = seen & (both if other == hash_round else ~both)
    scores = (_take(q, row_at) @ _take(k, key_at).mT).masked_fill(~seen, float("-inf"))
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = (scores - largest).exp2()
    return largest, weights.sum(-1, keepdim=True), weights @ _take(v, key_at)


def _take(x: Tensor, at: Tensor, missing: float = 0) -> Tensor:
    """(heads, n, d) and indices (heads, *m) -> (heads, *m, d); `missing` where the index is n."""
    return _select(F.pad(x, (0, 0, 0, 1), value=missing), at)


def _select(x: Tensor, at: Tensor) -> Tensor:
    """(heads, n, *rest) and indices (heads, *m) -> (heads, *m, *rest)."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    index = at + first.view(-1, *[1] * (at.dim() - 1))
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, at.shape)


BucketSoftmax.backends = (
    Backend("chunked", attend, never_refuses),
    Backend("reference", reference, never_refuses),
)
