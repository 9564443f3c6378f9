"""Rows laid out in tiles of one size by what group they are of, and the softmax of a row put
together from parts that were computed in several tiles.

How many tiles there are depends on sizes alone, whatever falls into which group, so that a graph
can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.sequences.ordering import running_maximum, stable_order

#: Groups of this number and above are none: what is of them is laid out nowhere.
NOWHERE = 2**60


@dataclass(frozen=True)
class Tiles:
    """Tokens laid out in tiles of one size, all those of a tile from one group, in order.

    at: (..., tiles, size), which token stands in a slot; the number of tokens where none does
    group: (..., tiles), NOWHERE where empty
    slot: (..., tokens), where a token stands; tiles · size where nowhere
    """

    at: Tensor
    group: Tensor
    slot: Tensor


def lay_out(groups: Tensor, size: int, tiles: int) -> Tiles:
    """Tiles of the tokens that have a group.

    groups: (..., tokens) int64
    size: slots of a tile
    tiles: how many are laid out
    """
    tokens = groups.shape[-1]
    order = stable_order(groups)
    ordered = groups.gather(-1, order)
    rank = ranks(ordered) % size
    tile = (rank == 0).cumsum(-1) - 1
    nowhere = ordered >= NOWHERE
    slot, tile = (
        (tile * size + rank).masked_fill(nowhere, tiles * size),
        tile.masked_fill(nowhere, tiles),
    )
    at = order.new_full((*order.shape[:-1], tiles * size + 1), tokens).scatter(-1, slot, order)
    group = order.new_full((*order.shape[:-1], tiles + 1), NOWHERE).scatter(-1, tile, ordered)
    return Tiles(
        at[..., :-1].unflatten(-1, (tiles, size)),
        group[..., :-1],
        torch.zeros_like(slot).scatter(-1, order, slot),
    )


def most_tiles(tokens: int, groups: int, size: int) -> int:
    """Tiles that hold any `tokens` of at most `groups` groups, when no tile mixes groups."""
    filled = min(tokens, groups)
    return filled + (tokens - filled) // size


def ranks(sorted_groups: Tensor) -> Tensor:
    """The place of every entry within its run of equal ones, (..., length) int64."""
    index = torch.arange(sorted_groups.shape[-1], device=sorted_groups.device)
    differs = sorted_groups[..., 1:] != sorted_groups[..., :-1]
    begins = torch.cat([torch.ones_like(sorted_groups[..., :1], dtype=torch.bool), differs], -1)
    return index - running_maximum(torch.where(begins, index, 0))


def rows_of(x: Tensor, call: Call) -> Tensor:
    """The rows of every key head, (batch · kv_heads, query_length · group, d): at every position
    those of the heads that share its keys.

    x: (batch, heads, query_length, d)
    """
    return x.unflatten(1, (-1, call.group)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def heads_of(x: Tensor, call: Call) -> Tensor:
    """What `rows_of` was made of: (batch, heads, query_length, d)."""
    return (
        x.unflatten(0, call.k.shape[:2])
        .unflatten(2, (-1, call.group))
        .transpose(2, 3)
        .flatten(1, 2)
    )


@dataclass(frozen=True)
class PartialSoftmax:
    """A softmax over some keys of every row, not yet divided by its sum. Weights are relative to
    2^largest.

    largest, total: (heads, rows, 1)
    out: (heads, rows, value_dim)
    """

    largest: Tensor
    total: Tensor
    out: Tensor

    @classmethod
    def of(cls, scores: Tensor, v: Tensor) -> PartialSoftmax:
        """Over all keys that have a score, as powers of 2.

        scores: (..., rows, keys), -inf where hidden
        v: (..., keys, value_dim)
        """
        lowest = torch.finfo(scores.dtype).min
        largest = scores.detach().amax(-1, keepdim=True).clamp(min=lowest)
        weights = (scores - largest).exp2()
        return cls(largest, weights.sum(-1, keepdim=True), weights @ v)

    def with_more(self, other: PartialSoftmax) -> PartialSoftmax:
        """Over the keys of both; they share none."""
        largest = self.largest.maximum(other.largest)
        mine, others = (self.largest - largest).exp2(), (other.largest - largest).exp2()
        return PartialSoftmax(
            largest, self.total * mine + other.total * others, self.out * mine + other.out * others
        )

    def at(self, slots: Tensor) -> PartialSoftmax:
        """Of these rows, (heads, *m, ...); a slot beyond the last has seen nothing."""
        lowest = torch.finfo(self.out.dtype).min
        return PartialSoftmax(
            take(self.largest, slots, lowest), take(self.total, slots), take(self.out, slots)
        )


def take(x: Tensor, at: Tensor, missing: float = 0) -> Tensor:
    """x at these indices, (heads, *m, d), and `missing` where the index is n.

    x: (heads, n, d)
    at: (heads, *m)
    """
    return select(F.pad(x, (0, 0, 0, 1), value=missing), at)


def select(x: Tensor, at: Tensor) -> Tensor:
    """x at these indices, (heads, *m, *rest).

    x: (heads, n, *rest)
    at: (heads, *m)
    """
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    index = at + first.view(-1, *[1] * (at.dim() - 1))
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, at.shape)
