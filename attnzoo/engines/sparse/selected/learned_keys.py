"""One key for every block of keys, by a learned network instead of their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.engines.sparse.selected.pooling import Pooling
from attnzoo.engines.sparse.selected.selection import Placed

WIDENING = 2  # inner width, in widths of a key


class LearnedKeys(nn.Module):
    """W2 relu(W1 [k_1 + p_1, ..., k_size + p_size]) for the keys of a block and the places in it,
    the same for all heads; a slot without a real key is 0 there.

    pooling: the blocks
    head_dim: numbers of a key
    """

    def __init__(self, pooling: Pooling, head_dim: int) -> None:
        super().__init__()
        self.pooling, width = pooling, WIDENING * head_dim
        self.places = nn.Parameter(torch.empty(pooling.size, head_dim))
        self.inner = nn.Parameter(torch.empty(width, pooling.size * head_dim))
        self.outer = nn.Parameter(torch.empty(head_dim, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: keys come out about as large as they go in."""
        with torch.no_grad():
            self.places.zero_()
            for weight in (self.inner, self.outer):
                weight.copy_(torch.randn_like(weight) * (2 / weight.shape[1]) ** 0.5)

    def forward(self, placed: Placed, dtype: torch.dtype) -> Tensor:
        """(batch, kv_heads, blocks, head_dim) in dtype."""
        call = placed.call
        keys = self.pooling.slots(call.k, 2).to(dtype) + self.places.to(dtype)
        if call.key_mask is not None:
            keys = keys * self.pooling.slots(call.key_mask, 1)[:, None, :, :, None]
        inner = F.linear(keys.flatten(3), self.inner.to(dtype)).relu()
        return F.linear(inner, self.outer.to(dtype))

    def macs(self, batch_size: int, kv_heads: int, key_length: int) -> int:
        """Multiply-accumulates of all blocks."""
        blocks = batch_size * kv_heads * self.pooling.blocks(key_length)
        return blocks * (self.inner.numel() + self.outer.numel())

    @property
    def numbers(self) -> int:
        """How many are learned."""
        return sum(weight.numel() for weight in self.parameters())
