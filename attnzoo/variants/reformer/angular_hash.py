"""Locality-sensitive hashing: tokens that point in nearly the same direction get one bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_positive, check_seed, check_set
from attnzoo.eager import is_recorded

PROJECTED = 2**22  # numbers that tokens are projected to at a time
# A rotation's numbers are multiples of 1/32: casting the module to half precision moves none of
# them
GRID = 32


class AngularHash(nn.Module):
    """Buckets of directions (Andoni et al. 2015): argmax of [xR, -xR], once for every hash round.

    num_buckets: even, or 1; or several such numbers, each hashed with rotations of its own, whose
        results together name one of as many buckets as their product is: far fewer directions for
        many buckets (Kitaev et al. 2020, section 3)
    num_hashes: hash rounds
    head_dim: numbers in each vector that is hashed
    seed: draws the rotations

    Its buffer `rotations` is R of each round, (num_hashes, head_dim, directions), normally
    distributed and the same for all heads: half as many directions as buckets, for each number one
    after the other.
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

    def drawn(self) -> tuple[Tensor, tuple[int, ...]]:
        """The rotations and how many buckets each of their parts tells apart, for compiled code."""
        return self.rotations, self.factors

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for the buckets of so many tokens."""
        return tokens * self.rotations.numel()

    def forward(self, x: Tensor) -> Tensor:
        """Buckets, (..., num_hashes, length), int64 in [0, num_buckets).

        x: (..., length, head_dim)

        Projected in float64, where a number as short as float32 times a rotation is exact: a token
        gets the same bucket in every precision and in every product that it is a part of, alone
        while decoding as among others.
        """
        check_set("the rotations of its hashes", self.rotations, x)
        x = x.detach().double()
        tokens = x.shape[-2]
        if not is_recorded():
            tokens = max(1, PROJECTED // max(1, x.shape[:-2].numel() * sum(self.factors)))
        if x.shape[-2] == 1:  # one product serves all rounds
            directions = self.rotations.double().transpose(0, 1).flatten(1)
            projected = (x @ directions).unflatten(-1, (self.num_hashes, -1)).transpose(-2, -3)
            return self._named(projected)
        rounds = []
        for rotation in self.rotations.double():
            rounds.append(
                torch.cat([self._named(some @ rotation) for some in x.split(tokens, -2)], -1)
            )
        return torch.stack(rounds, -2)

    def _named(self, projected: Tensor) -> Tensor:
        """Buckets of tokens by what they are in each direction, (..., directions)."""
        bucket = None
        for some in projected.split([factor // 2 for factor in self.factors], -1):
            if some.shape[-1]:
                more = torch.cat([some, -some], -1).argmax(-1)
                bucket = more if bucket is None else bucket * (2 * some.shape[-1]) + more
        return (
            projected.new_zeros(projected.shape[:-1], dtype=torch.int64)
            if bucket is None
            else bucket
        )
