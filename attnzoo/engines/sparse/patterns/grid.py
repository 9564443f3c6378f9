"""The sizes that a pattern is laid over, and where the positions of padded samples begin."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.sequences.padding import ends, leading, starts_real


@dataclass(frozen=True)
class Grid:
    """The sizes of a call, as a pattern takes them.

    heads: number of query heads
    query_length, key_length: number of queries and of keys
    is_causal: whether later keys will be hidden
    device: where the pattern makes its tensors; None: torch's default
    """

    heads: int
    query_length: int
    key_length: int
    is_causal: bool
    device: torch.device | str | None = None

    @property
    def offset(self) -> int:
        return self.key_length - self.query_length

    def query_positions(self) -> Tensor:
        """The position of each query, (1, query_length, 1)."""
        return torch.arange(self.offset, self.key_length, device=self.device)[None, :, None]

    def key_positions(self) -> Tensor:
        """The position of each key, (1, 1, key_length)."""
        return torch.arange(self.key_length, device=self.device)[None, None]

    def query_blocks(self, block_size: int) -> Tensor:
        """The numbers of the blocks of positions that hold a query, (query_blocks,); some are
        negative where there are more queries than keys."""
        return torch.arange(
            self.offset // block_size, (self.key_length - 1) // block_size + 1, device=self.device
        )

    def num_key_blocks(self, block_size: int) -> int:
        """How many blocks of slots hold keys."""
        return -(-self.key_length // block_size)

    def filled_blocks(self, block_size: int) -> Tensor:
        """How many blocks of positions there are up to the last key, (1, 1), or (batch, 1, 1) in a
        `PaddedGrid`."""
        return torch.full((1, 1), self.num_key_blocks(block_size), device=self.device)


@dataclass(frozen=True, eq=False)
class PaddedGrid(Grid):
    """The sizes of a call whose samples are padded.

    A slot is an index along the length; a position counts from the first real token of its sample,
    so that positions have a batch dimension in front.

    length: (batch,), how many positions there are from the first real token to the last key
    first: (batch,), the slot of position 0; None: slot 0 in every sample
    """

    length: Tensor = field(kw_only=True)
    first: Tensor | None = field(kw_only=True, default=None)

    def query_positions(self) -> Tensor:
        """The position of each query, (batch, 1, query_length, 1)."""
        return self._counted(super().query_positions())

    def key_positions(self) -> Tensor:
        """The position of each key, (batch, 1, 1, key_length). Padded slots have positions, too;
        the call's key_mask hides them."""
        return self._counted(super().key_positions())

    def _counted(self, slots: Tensor) -> Tensor:
        return slots[None] if self.first is None else slots - self.first[:, None, None, None]

    def query_blocks(self, block_size: int) -> Tensor:
        """The numbers of the blocks that hold a query of any sample, (query_blocks,)."""
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
    """The sizes `grid` with the padding of a key_mask.

    In a causal call every sample is taken to end at the last slot: what a row sees must not depend
    on whether later tokens are real.

    key_mask: (batch, key_length) bool, False in padded slots
    """
    first = leading(key_mask)
    length = (grid.key_length if grid.is_causal else ends(key_mask)) - first
    first = None if starts_real(key_mask) else first
    return PaddedGrid(**vars(grid), length=length, first=first)


def grid_of(call: Call) -> Grid:
    """The sizes of a call, as its pattern takes them."""
    return Grid(
        _constant(call.q.shape[1]),
        _constant(call.query_length),
        _constant(call.key_length),
        call.is_causal,
        call.q.device,
    )


def _constant(length: int) -> int:
    """The same number, as a constant where a compiler has it as a symbol, since the blocks of a
    pattern are laid out for one length. int() would leave it a symbol."""
    if type(length) is int and not torch.compiler.is_compiling():
        return length
    return len(range(int(length)))
