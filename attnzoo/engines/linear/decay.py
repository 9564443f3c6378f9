"""How much of a key is left after the tokens that follow it, and what that makes of a chunk.

A key enters the sums with a weight (key_weights.py) and fades (here). Both give the four factors of
`Worth`, which multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call


@dataclass(frozen=True)
class Worth:
    """Factors of chunks side by side; None stands for 1.

    relative: (batch, kv_heads, chunks, length, length), of key j in row i of its own chunk, 0 for
        j > i.
    carry: (batch, kv_heads, chunks, group · length, 1), of the sums before a chunk in its rows.
    weights: (batch, kv_heads, chunks, length), of keys in the sums after their chunk.
    shrink: (batch, kv_heads, chunks), of the sums before a chunk in those after it.
    """

    relative: Tensor | None = None
    carry: Tensor | None = None
    weights: Tensor | None = None
    shrink: Tensor | None = None

    def times(self, other: Worth) -> Worth:
        """Both together."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Worth(*(product(a, b) for a, b in pairs))


@overload
def product(a: Tensor, b: Tensor | None) -> Tensor: ...
@overload
def product(a: Tensor | None, b: Tensor | None) -> Tensor | None: ...
def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a · b, where None stands for 1."""
    return b if a is None else a if b is None else a * b


class Decay:
    """No decay: a key is worth the same to every later row."""

    fades = False

    def of_chunks(
        self, like: Tensor, count: Tensor, group: int, *, behind: bool, remember: bool
    ) -> Worth:
        """Factors of chunks.

        like: features of their keys, (batch, kv_heads, chunks, length, width).
        count: real tokens of each chunk up to each, `counted`, (batch or 1, chunks or 1, length).
        group: rows that share a key. behind: whether something lies before the first chunk.
        remember: whether the sums after the chunks are wanted.
        """
        return Worth()

    def of_keys(self, like: Tensor, count: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`weights` and `shrink` of one chunk whose rows nobody reads, (batch or 1, kv_heads, 1,
        length) and (batch or 1, kv_heads, 1)."""
        return None, None

    def of_rows(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """What is left of every key at every row, broadcastable to (batch, heads, query_length,
        key_length); later keys are left to causality."""
        return None


@dataclass
class ConstantDecay(Decay):
    """γ = 1 - 2^(-5 - h) in head h of the keys, for every real token that follows (Sun et al. 2023,
    RetNet, equation 8).

    first, count: the heads of queries that these are among all, for a process that holds only some.
    """

    first: int
    count: int

    fades = True

    def gamma(self, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(kv_heads,)."""
        heads = torch.arange(kv_heads, dtype=dtype, device=device)
        return 1 - 2.0 ** (-5 - (heads + self.first * kv_heads // self.count))

    def of_chunks(
        self, like: Tensor, count: Tensor, group: int, *, behind: bool, remember: bool
    ) -> Worth:
        gamma = self.gamma(like.shape[1], like.dtype, like.device)
        since = (count[..., :, None] - count[..., None, :]).clamp(min=0)
        relative = (gamma[:, None, None, None] ** since[:, None]).tril()
        carry = weights = shrink = None
        if behind:
            carry = (gamma[:, None, None] ** count[:, None]).repeat(1, 1, 1, group)[..., None]
        if remember:
            weights, shrink = self.of_keys(like, count)
            assert shrink is not None
            shrink = shrink.expand(-1, -1, like.shape[2])
        return Worth(relative, carry, weights, shrink)

    def of_keys(self, like: Tensor, count: Tensor) -> tuple[Tensor | None, Tensor | None]:
        base = self.gamma(like.shape[1], like.dtype, like.device)[:, None, None]
        last = count[:, None, :, -1:]
        return base ** (last - count[:, None]), (base**last)[..., 0]

    def of_rows(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        gamma = self.gamma(call.k.shape[1], dtype, call.k.device).repeat_interleave(call.group)
        keys = counted(call.key_length, call.key_mask, call.q.device)
        rows = F.pad(keys, (max(0, -call.offset), 0))[..., -call.query_length :]
        since = (rows[..., :, None] - keys[..., None, :]).clamp(min=0)
        return gamma[:, None, None] ** since


NO_DECAY = Decay()


def counted(length: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Real tokens of a chunk up to each, itself included, (batch or 1, chunks or 1, length).

    key_mask: (batch, chunks, length), or of one chunk (batch, length).
    """
    if key_mask is None:
        return torch.arange(1, length + 1, device=device)[None, None]
    count = key_mask.cumsum(-1)
    return count if count.dim() == 3 else count[:, None]
