"""Parity: whether the ones so far are odd in number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.tasks.task import Batch, Task


@dataclass(frozen=True)
class Parity(Task):
    """Random bits; at every one of them the answer is their sum so far, modulo 2.

    The least that asks for a state which a token turns to another one: what only fades or adds up
    (eigenvalues from 0 to 1) cannot follow it over any length (Grazzi et al. 2024,
    arXiv:2411.12537, theorem 1).

    length: tokens.
    """

    length: int = 64

    name = "parity"
    title = "parity"
    form = "decoder"

    def __post_init__(self) -> None:
        self._check_positive()

    @property
    def vocabulary_size(self) -> int:
        return 2

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        bits = torch.randint(2, (count, self.length), generator=generator)
        return Batch(bits, bits.cumsum(1) % 2)
