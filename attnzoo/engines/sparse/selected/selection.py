"""What a variant whose keys are selected by the data gives the engine: a selection, which names the
blocks of keys that each query sees.

Blocks hold `block_size` consecutive slots and count from the first real token of a sample. A
selection is made of the call, its inputs included, and is not differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import holds_anywhere, may_branch
from attnzoo.engines.engine import Shape
from attnzoo.engines.stretch_sums import KEY_SUMS
from attnzoo.sequences.padding import ahead_behind, leading, starts_real

NONE = -1  # stands for no block


@dataclass(frozen=True)
class Placed:
    """A call whose keys stand where they would stand without leading padding, which is moved behind
    the end.

    call: its keys, and whatever has an entry for every key, are moved; its queries are not
    positions: (batch or 1, query_length), where every query stands among the keys; negative before
        the first
    """

    call: Call
    positions: Tensor

    @classmethod
    def of(cls, call: Call) -> Placed:
        """The call placed."""
        mask = call.key_mask
        positions = torch.arange(call.offset, call.key_length, device=call.q.device)[None]
        if mask is None or starts_real(mask):
            return cls(call, positions)
        moved = call.mapped({"keys": lambda x, dim: ahead_behind(x, mask, dim)})
        return cls(moved, positions - leading(mask)[:, None])

    def real_keys(self, block_size: int) -> Tensor:
        """How many real keys every block has, (batch or 1, key_blocks) int64."""
        mask, length = self.call.key_mask, self.call.key_length
        if mask is None:
            begins = torch.arange(0, length, block_size, device=self.call.k.device)
            return (length - begins).clamp(max=block_size)[None]
        return in_blocks(mask, 1, block_size).sum(2)


@dataclass(frozen=True)
class Selection:
    """The key blocks that every query sees.

    blocks: (batch, choosers, choices, width) int64, numbers of key blocks, each once in a row, and
        NONE where a row has fewer. choosers divide the query heads: consecutive heads share one
    choice_of: (batch or 1, query_length) int64, which of the choices a query takes; None: each has
        its own
    """

    blocks: Tensor
    choice_of: Tensor | None = None

    def of_heads(self, heads: int) -> Tensor:
        """The blocks of every head and query, (batch, heads, query_length, width)."""
        blocks = self.blocks.repeat_interleave(heads // self.blocks.shape[1], 1)
        if self.choice_of is None:
            return blocks
        index = self.choice_of[:, None, :, None].expand(*blocks.shape[:2], -1, blocks.shape[3])
        return blocks.gather(2, index)


class Selector(ABC):
    """Selects key blocks by the data.

    block_size: keys of a block
    summed: of how many keys, from the first on, it reads the sums; None: of none
    takes_own: whether the block of a query is always among those that it sees
    """

    block_size: int
    summed: int | None = None
    takes_own: bool = False

    @abstractmethod
    def select(self, placed: Placed) -> Selection:
        """The blocks that each query of a call sees. In a causal call none of them begins behind
        the query; what is behind it inside a block, the engine hides."""

    def of_one(self, placed: Placed) -> Tensor:
        """The blocks that the one query of a call sees, (batch, choosers, width), -1 where there
        are fewer: for compiled code, of a call that it takes."""
        selection = self.select(placed)
        if selection.choice_of is None:
            return selection.blocks[:, :, 0]
        return selection.of_heads(placed.call.q.shape[1])[:, :, 0]

    @abstractmethod
    def width(self, key_blocks: int) -> int:
        """The most blocks that a row sees of so many."""

    @abstractmethod
    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of a selection."""

    @abstractmethod
    def elementwise(self, shape: Shape) -> int:
        """Exponentials and divisions of a selection."""

    def sees_all(self, key_length: int) -> bool:
        """Whether every query is known to see all of so many keys that the masks leave it."""
        return False


def in_blocks(x: Tensor, dim: int, block_size: int) -> Tensor:
    """x with a dimension cut into blocks, the last one filled up with zeros: (..., length, ...) ->
    (..., blocks, block_size, ...)."""
    spare = -x.shape[dim] % block_size
    if spare:
        x = F.pad(x, (0, 0) * (x.dim() - dim - 1) + (0, spare))
    return x.unflatten(dim, (-1, block_size))


def stretch_sums(x: Tensor, known: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """The sums of stretches of keys or values, the last one filled up with zeros, (batch, kv_heads,
    stretches, d) in dtype.

    x: (batch, kv_heads, key_length, d)
    known: those of the first ones; None: of none
    """
    if known is None:
        return in_blocks(x, 2, size).sum(3, dtype=dtype)
    rest = x[:, :, known.shape[2] * size :]
    if not rest.shape[2]:
        return known.to(dtype)
    return torch.cat([known.to(dtype), in_blocks(rest, 2, size).sum(3, dtype=dtype)], 2)


def block_means(placed: Placed, block_size: int) -> Tensor:
    """The mean of the real keys of every block, (batch, kv_heads, key_blocks, head_dim) float64, 0
    where a block has none."""
    call = placed.call
    total = stretch_sums(call.k.detach(), call.get(KEY_SUMS.name), block_size, torch.float64)
    return total / placed.real_keys(block_size).clamp(min=1)[:, None, :, None]


def highest(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores of every row, (..., count) int64, NONE where there are no
    more than -inf; of equal scores that of the lower place.

    scores: (..., places)
    """
    count, wanted = min(count, scores.shape[-1]), count
    if torch.compiler.is_exporting():
        found = scores.topk(count, -1)  # ONNX breaks ties so by itself
    elif may_branch(scores):
        found = scores.topk(min(count + 1, scores.shape[-1]), -1)
        if found.values.shape[-1] > count:
            last, next_one = found.values[..., count - 1], found.values[..., count]
            if holds_anywhere((last == next_one) & (last > -torch.inf)):
                found = scores.sort(dim=-1, descending=True, stable=True)
    else:
        found = scores.sort(dim=-1, descending=True, stable=True)
    values, places = found[0][..., :count], found[1][..., :count]
    return F.pad(places.masked_fill(values == -torch.inf, NONE), (0, wanted - count), value=NONE)
