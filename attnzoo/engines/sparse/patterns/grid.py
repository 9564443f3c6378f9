"""The sizes that a pattern is laid over, and where the positions of padded samples begin."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.sequences.padding import ends, leading


@dataclass(frozen=True)
class Grid:
    """The sizes that a pattern is laid over."""

    heads: int
    query_length: int
    key_length: int
    is_causal: bool
    device: torch.device | str | None = None

    @property
    def offset(self) -> int:
        return self.key_length - self.query_length

    def query_positions(self) -> Tensor:
        """(1, query_length, 1)."""
        return torch.arange(self.offset, self.key_length, device=self.device)[None, :, None]

    def key_positions(self) -> Tensor:
        """(1, 1, key_length)."""
        return torch.arange(self.key_length, device=self.device)[None, None]

    def query_blocks(self, block_size: int) -> Tensor:
        """Blocks of positions that hold a query, (query_blocks,); negative where there are more
        queries than keys."""
        return torch.arange(
            self.offset // block_size, (self.key_length - 1) // block_size + 1, device=self.device
        )

    def num_key_blocks(self, block_size: int) -> int:
        """Blocks of slots that hold keys."""
        return -(-self.key_length // block_size)

    def filled_blocks(self, block_size: int) -> Tensor:
        """Blocks of positions up to the last key, (1, 1), or (batch, 1, 1) in a `PaddedGrid`."""
        return torch.full((1, 1), self.num_key_blocks(block_size), device=self.device)


@dataclass(frozen=True, eq=False)
class PaddedGrid(Grid):
    """A grid whose samples are padded: positions count from the first real token of each, so that
    they have a batch dimension in front.

    length: (batch,), positions from the first real token to the last key. first: (batch,), the slot
    of position 0; None: slot 0 in every sample.
    """

    length: Tensor = field(kw_only=True)
    first: Tensor | None = field(kw_only=True, default=None)

    def query_positions(self) -> Tensor:
        """(batch, 1, query_length, 1)."""
        return self._counted(super().query_positions())

    def key_positions(self) -> Tensor:
        """(batch, 1, 1, key_length); what is padded has a position too, and its key_mask hides
        it."""
        return self._counted(super().key_positions())

    def _counted(self, slots: Tensor) -> Tensor:
        return slots[None] if self.first is None else slots - self.first[:, None, None, None]

    def query_blocks(self, block_size: int) -> Tensor:
        """Of all samples together."""
        if self.first is None:
            return super().query_blocks(block_size)
        lowest, highest = 0, self.key_length
        if can_look(self.first):
            lowest, highest = int(self.first.min()), int(self.first.max())
        low, high = self.offset - highest, self.key_length - 1 - lowest
        return torch.arange(low // block_size, high // block_size + 1, device=self.device)

    def filled_blocks(self, block_size: int) -> Tensor:
        return ((self.length + block_size - 1) // block_size)[:, None, None]


def padded(grid: Grid, key_mask: Tensor) -> PaddedGrid:
    """The grid of a call with this key_mask, (batch, key_length) bool. A causal one does not know
    where its samples end."""
    first = leading(key_mask)
    length = (grid.key_length if grid.is_causal else ends(key_mask)) - first
    return PaddedGrid(**vars(grid), length=length, first=first)


def grid_of(call: Call) -> Grid:
    """The sizes of a call, for its pattern."""
    return Grid(
        _constant(call.q.shape[1]),
        _constant(call.query_length),
        _constant(call.key_length),
        call.is_causal,
        call.q.device,
    )


def _constant(length: int) -> int:
    """The same number, which a compiled graph then takes as a constant: a layout is made for one
    length. int() would stay symbolic."""
    return len(range(int(length)))
