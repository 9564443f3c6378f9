"""Random blocks of a sparse A, drawn by a hash of where they stand, and lists of blocks as sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.arguments import check_count, check_seed
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern, block_limit, distinct
from attnzoo.engines.sparse.patterns.grid import Grid


@dataclass(frozen=True)
class RandomBlocks(BlockPattern):
    """Distinct random blocks for each query block and head, in a causal call from earlier blocks
    only.

    The draw is a hash of (seed, head, query block, index), so that it is the same on every device
    and, in a causal call, does not change as the sequence grows.

    num_blocks: how many blocks to draw; fewer where fewer are left
    block_size: number of positions in a block
    seed: chooses the draw
    outside: a pattern whose blocks are not drawn
    first_head: the number of the grid's first head in the hash, 0 unless heads are split over
        processes
    """

    num_blocks: int
    block_size: int
    seed: int
    outside: BlockPattern
    first_head: int = 0
    tied_to_end = True

    def __post_init__(self) -> None:
        check_count("num_random_blocks", self.num_blocks)
        check_seed(self.seed)

    @property
    def most_blocks(self) -> int:
        return self.num_blocks

    def key_blocks(self, grid: Grid) -> Tensor:
        rows = grid.query_blocks(self.block_size)
        limit = block_limit(grid, self.block_size)
        taken = distinct(self.outside.key_blocks(grid), limit)
        free = (limit - (taken < limit[..., None]).sum(-1))[..., None]  # (1, query_blocks, 1)
        index = torch.arange(self.num_blocks, device=grid.device)
        heads = torch.arange(self.first_head, self.first_head + grid.heads, device=grid.device)[
            :, None, None
        ]
        uniform = hashed_uniform(self.seed, heads, rows[:, None], index)
        left = (free - index).clamp(min=0)
        drawn = (
            uniform * left
        ).long()  # draw t picks one of the free - t that draws 0..t-1 have left
        return _skip(_skip_each_other(drawn), taken).where(left > 0, -1)


def _skip_each_other(drawn: Tensor) -> Tensor:
    """Turn draws without replacement, where draw t counts only what is left, into distinct
    ranks."""
    ranks: list[Tensor] = []
    for t in range(drawn.shape[-1]):
        rank = drawn[..., t]
        for other in torch.stack(ranks, -1).sort(-1).values.unbind(-1) if ranks else ():
            rank = rank + (rank >= other)
        ranks.append(rank)
    return torch.stack(ranks, -1) if ranks else drawn


def _skip(ranks: Tensor, taken: Tensor) -> Tensor:
    """The rank-th block that is not among the sorted `taken`."""
    for other in taken.unbind(-1):
        ranks = ranks + (ranks >= other[..., None])
    return ranks


def hashed_uniform(seed: int, *indices: Tensor) -> Tensor:
    """A number in [0, 1), float64, for each combination of broadcast integer indices below 2**31: a
    32-bit hash of them in turn.

    No product here reaches 2**63: compilers that treat index arithmetic as whole numbers do not
    wrap as torch does.
    """
    value = _mix(torch.full((), seed & _MASK, dtype=torch.int64, device=indices[0].device))
    value = _mix(value ^ ((seed >> 32) & _MASK))
    for index in indices:
        value = _mix(value ^ (((index + 1) * 0x9E3779B1) & _MASK))
    return value.double() * 2.0**-32


_MASK = 2**32 - 1


def _mix(value: Tensor) -> Tensor:
    for _ in range(2):
        value = ((value ^ (value >> 16)) * 0x45D9F3B) & _MASK
    return value ^ (value >> 16)
