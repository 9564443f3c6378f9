"""Locality-sensitive hashing: tokens that point in nearly the same direction get one bucket, and a
bucket is cut into chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_positive, check_seed, check_set
from attnzoo.eager import is_recorded
from attnzoo.ordering import running_maximum, search, stable_order

# Numbers of no chunk: of a padded key, and of a query whose bucket holds no key that it may see.
# They are far from all others and each other.
NO_KEY, NO_QUERY = 2**60, 2**61
PROJECTED = 2**22  # numbers that tokens are projected to at a time
# A rotation's numbers are multiples of 1/32: casting the module to half precision moves none of
# them
GRID = 32


class AngularHash(nn.Module):
    """Buckets of directions (Andoni et al. 2015): argmax of [xR, -xR], once for every hash round.

    num_buckets: even, or 1; or several such numbers, each hashed with rotations of its own, whose
    results together name one of as many buckets as their product is: far fewer directions for many
    buckets (Kitaev et al. 2020, section 3).
    rotations: (num_hashes, head_dim, directions), normally distributed, R of each round, half as
    many directions as buckets for each number one after the other; the same for all heads.
    """

    def __init__(
        self, head_dim: int, num_buckets: int | Sequence[int], num_hashes: int, seed: int
    ) -> None:
        super().__init__()
        factors = tuple(num_buckets) if isinstance(num_buckets, Sequence) else (num_buckets,)
        if not factors:
            raise ValueError("num_buckets=() is empty; give one even number, or several")
        for factor in factors:
            if check_positive("num_buckets", factor) % 2 and factor > 1:
                raise ValueError(
                    f"num_buckets={factor} must be even, or 1: a bucket and its opposite share a "
                    "direction"
                )
        self.factors, self.num_buckets = factors, math.prod(factors)
        self.num_hashes = check_positive("num_hashes", num_hashes)
        self.rotations: Tensor
        self.register_buffer("rotations", self._draw(head_dim, seed))
        self.seed = seed

    def _draw(self, head_dim: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(check_seed(seed))
        count = sum(factor // 2 for factor in self.factors)
        directions = torch.randn(self.num_hashes, head_dim, count, generator=generator)
        return (directions * GRID).round().clamp(-255, 255) / GRID

    def redraw(self, seed: int) -> None:
        """Replace the rotations by another draw, in place."""
        self.rotations.copy_(self._draw(self.rotations.shape[1], seed))
        self.seed = seed

    def reset_parameters(self) -> None:
        """Draw the rotations of the seed again, where they lost their values."""
        self.redraw(self.seed)

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for the buckets of so many tokens."""
        return tokens * self.rotations.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., length, head_dim) -> buckets (..., num_hashes, length), int64 in [0, num_buckets).

        Projected in float64, where a number as short as float32 times a rotation is exact: a token
        gets the same bucket in every precision and in every product that it is a part of, alone
        while decoding as among others.
        """
        check_set("the rotations of its hashes", self.rotations, x)
        x = x.detach().double()
        tokens = x.shape[-2]
        if not is_recorded():
            tokens = max(1, PROJECTED // max(1, x.shape[:-2].numel() * max(self.factors)))
        rounds = []
        for rotation in self.rotations.double():
            rounds.append(
                torch.cat([self._buckets(some, rotation) for some in x.split(tokens, -2)], -1)
            )
        return torch.stack(rounds, -2)

    def _buckets(self, x: Tensor, rotation: Tensor) -> Tensor:
        bucket = x.new_zeros(x.shape[:-1], dtype=torch.int64)
        directions = rotation.split([factor // 2 for factor in self.factors], -1)
        for factor, some in zip(self.factors, directions, strict=True):
            if factor > 1:
                projected = x @ some
                bucket = bucket * factor + torch.cat([projected, -projected], -1).argmax(-1)
        return bucket


@dataclass(frozen=True)
class Chunks:
    """Which chunk every token stands in, in each hash round: queries (..., num_hashes, queries),
    keys (..., num_hashes, keys), int64.

    The chunks of a bucket are numbered one after the other, with a gap before the next bucket.
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
    """Cut every bucket into chunks of `size` consecutive real keys; a query stands in the chunk of
    the last one at or before it.

    queries, keys: buckets. positions: (queries,), where a query stands among the keys; negative
    before the first. key_mask: broadcastable to keys. A query before all keys of its bucket stands
    in the first chunk or, when causal, in none. A key's chunk depends on no later token.
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
    after = search(
        ordered, wanted, right=True
    )  # the first key behind it in its bucket, or of a later bucket
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

    at: (..., tiles, size), which token stands in a slot; the number of tokens where none does.
    chunk: (..., tiles), NO_KEY where empty.
    slot: (..., tokens), where a token stands; tiles · size where nowhere.
    """

    at: Tensor
    chunk: Tensor
    slot: Tensor


def lay_out(chunks: Tensor, size: int, tiles: int) -> Tiles:
    """Tiles for tokens in these chunks, (..., tokens). Tokens of no chunk are left out."""
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
