"""Decay: how much of a key is left after the tokens that follow it.

A key enters the sums over keys and values with a weight (key_weights.py), and then fades (here).
For chunks of tokens that are computed together, each of the two gives the four factors of `Worth`;
the factors of both are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call


@dataclass(frozen=True)
class Worth:
    """What keys and earlier sums count in chunks that are computed side by side; None stands for 1.

    relative: (batch, kv_heads, chunks, length, length), the factor of key j in row i of its own
        chunk, 0 for j > i
    carry: (batch, kv_heads, chunks, group · length, 1), the factor of the sums before a chunk in
        each of its rows; a group of query heads shares a key head
    weights: (batch, kv_heads, chunks, length), the factor of each key in the sums after its chunk
    shrink: (batch, kv_heads, chunks), the factor of the sums before a chunk in those after it
    """

    relative: Tensor | None = None
    carry: Tensor | None = None
    weights: Tensor | None = None
    shrink: Tensor | None = None

    def times(self, other: Worth) -> Worth:
        """The products of the factors of both."""
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
        """The factors of chunks that are computed side by side.

        like: (batch, kv_heads, chunks, length, width), features of their keys, whose shape, dtype
            and device are used
        count: (batch or 1, chunks or 1, length), see `counted`
        group: query heads that share a key head
        behind: whether there are sums before the first chunk
        remember: whether the sums after the chunks are wanted
        """
        return Worth()

    def of_keys(self, like: Tensor, count: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The factors `weights` and `shrink` of one chunk that is only added to the sums.

        like: (batch, kv_heads, ..., length, width), features of its keys
        count: (batch or 1, 1, length), see `counted`

        Returns (batch or 1, kv_heads, 1, length) and (batch or 1, kv_heads, 1); None stands for 1.
        """
        return None, None

    def of_tokens(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The logarithm of what each token leaves of all keys before it, (batch, kv_heads,
        length); None where it leaves them as they are.

        call: whose keys are the tokens
        dtype: of the result
        """
        return None

    def of_rows(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        """What is left of every key at every row, for the reference.

        call: the sizes and the key_mask
        dtype: of the result

        Returns a tensor broadcastable to (batch, heads, query_length, key_length), or None for no
        decay. Keys after a row, which only causality hides, have the factor 1.
        """
        return None


@dataclass
class ConstantDecay(Decay):
    """A key of head h is multiplied by γ = 1 - 2^(-5 - h) for every real token that follows it (Sun
    et al. 2023, RetNet, arXiv:2307.08621, equation 8).

    first: the number of the first query head that this process holds, 0 unless heads are split
        over processes
    count: how many query heads this process holds
    """

    first: int
    count: int

    fades = True

    def gamma(self, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """γ of each key head, (kv_heads,)."""
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
        fresh = None if count.shape[-1] == 1 else base ** (last - count[:, None])
        return fresh, (base**last)[..., 0]

    def of_tokens(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        kv_heads, device = call.k.shape[1], call.k.device
        faded = _logarithms(self.first, self.count, kv_heads, dtype, device)
        faded = faded[:, None].expand(call.k.shape[0], -1, call.key_length)
        return faded if call.key_mask is None else faded * call.key_mask[:, None]

    def of_rows(self, call: Call, dtype: torch.dtype) -> Tensor | None:
        gamma = self.gamma(call.k.shape[1], dtype, call.k.device).repeat_interleave(call.group)
        keys = counted(call.key_length, call.key_mask, call.q.device)
        rows = F.pad(keys, (max(0, -call.offset), 0))[..., -call.query_length :]
        since = (rows[..., :, None] - keys[..., None, :]).clamp(min=0)
        return gamma[:, None, None] ** since


@lru_cache(maxsize=8)
def _logarithms(
    first: int, count: int, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """log γ of each key head, (kv_heads,), for a step of decoding not to make again."""
    with torch.inference_mode(False):
        return ConstantDecay(first, count).gamma(kv_heads, dtype, device).log()


NO_DECAY = Decay()


def counted(length: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """For each token of a chunk, the number of real tokens up to it, itself included.

    length: tokens of a chunk
    key_mask: (batch, chunks, length), or (batch, length) for one chunk; None: all are real
    device: of the result

    Returns (batch or 1, chunks or 1, length).
    """
    if key_mask is None:
        return torch.arange(1, length + 1, device=device)[None, None]
    count = key_mask.cumsum(-1)
    return count if count.dim() == 3 else count[:, None]
