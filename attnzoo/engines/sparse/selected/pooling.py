"""Means of blocks of keys that may overlap, and what a row weighs of each as what it weighs of the
keys in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.arguments import check_positive
from attnzoo.engines.sparse.selected.selection import Placed, in_blocks, stretch_sums


@dataclass(frozen=True)
class Pooling:
    """Blocks of `size` keys, one of which begins at every `stride`-th, from the first real token
    on. A stretch of `stride` keys lies in size / stride blocks.

    raises: ValueError where stride does not divide size
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        check_positive("compressed_size", self.size)
        if self.size % check_positive("compressed_stride", self.stride):
            raise ValueError(
                f"compressed_stride={self.stride} must divide compressed_size={self.size}, so that "
                "blocks begin and end together"
            )

    @property
    def overlap(self) -> int:
        """Blocks that a key lies in."""
        return self.size // self.stride

    def blocks(self, key_length: int) -> int:
        """How many blocks so many keys have, one at least, which may not be whole."""
        return max(1, -(-key_length // self.stride) - self.overlap + 1)

    def counts(self, placed: Placed) -> Tensor:
        """Real keys of every block, (batch or 1, blocks)."""
        return self._joined(placed.real_keys(self.stride), 1)

    def means(
        self, x: Tensor, placed: Placed, dtype: torch.dtype, known: Tensor | None = None
    ) -> Tensor:
        """The mean over the real keys of every block, (batch, kv_heads, blocks, d) in dtype; 0
        where a block has none.

        x: (batch, kv_heads, key_length, d), of placed keys
        known: sums of x over the first stretches; None: of none
        """
        total = self._joined(stretch_sums(x, known, self.stride, dtype), 2)
        return total / self.counts(placed).clamp(min=1)[:, None, :, None]

    def slots(self, x: Tensor, dim: int) -> Tensor:
        """The slots of every block, of x of placed keys with their length at `dim`: (..., blocks,
        size, ...); those behind the last key are 0."""
        found = self._overlapping(in_blocks(x, dim, self.stride), dim)
        return found.movedim(-1, dim + 1).flatten(dim + 1, dim + 2)

    def ended(self, placed: Placed) -> Tensor:
        """Which blocks end at a query or before it and have a key, (batch or 1, query_length,
        blocks) bool."""
        counts = self.counts(placed)
        begins = torch.arange(counts.shape[1], device=counts.device) * self.stride
        return (begins + self.size <= placed.positions[..., None] + 1) & (counts > 0)[:, None]

    def of_stretches(self, weights: Tensor) -> Tensor:
        """What every stretch has of the blocks that it lies in, (..., stretches): of weights, (...,
        blocks), their sum."""
        more = self.overlap - 1
        return F.pad(weights, (more, more)).unfold(-1, more + 1, 1).sum(-1) if more else weights

    def ended_pairs(self, length: int) -> int:
        """How many blocks end at each of so many first rows or before it, in all."""
        rows = max(0, length - self.size + 1)
        full, rest = divmod(rows, self.stride)
        return self.stride * (full * (full + 1) // 2) + rest * (full + 1)

    def _joined(self, stretches: Tensor, dim: int) -> Tensor:
        """The sums of blocks of those of stretches."""
        if self.overlap == 1:
            return stretches
        return self._overlapping(stretches, dim).sum(-1)

    def _overlapping(self, stretches: Tensor, dim: int) -> Tensor:
        """The stretches of every block, as a last dimension."""
        missing = self.overlap - stretches.shape[dim]
        if missing > 0:
            stretches = F.pad(stretches, (0, 0) * (stretches.dim() - dim - 1) + (0, missing))
        return stretches.unfold(dim, self.overlap, 1)
