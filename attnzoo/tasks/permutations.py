"""Permutations: where a row of things stands after one permutation behind another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from attnzoo.tasks.task import Batch, Task, at_least

MOST = 6  # things: 720 orders of them are answers enough


@dataclass(frozen=True)
class Permutations(Task):
    """Random permutations of a few things; at every one of them the answer is the product of those
    so far, the order that the things stand in (Merrill et al. 2024, arXiv:2404.08819; the choice of
    permutations as in Grazzi et al. 2024, arXiv:2411.12537).

    Of 3 things they do not commute, of 5 the group is not solvable, so that no fixed number of
    layers whose states only fade follows them over any length. A swap of two things turns one
    direction of a state, which a delta rule with β = 2 does in one token.

    length: tokens.
    things: how many are permuted: S3, S5.
    moved: how many of them a token moves at most; 2 is swaps alone, beside staying.
    """

    length: int = 32
    things: int = 3
    moved: int = 2

    name = "permutations"
    title = "products of permutations"
    form = "decoder"

    def __post_init__(self) -> None:
        self._check_positive()
        at_least("things", self.things, 2, "one alone stands in one order")
        at_least("moved", self.moved, 2, "no permutation moves a single thing")
        for name, most in (("things", MOST), ("moved", self.things)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} is too large; give at most {most}")

    @property
    def vocabulary_size(self) -> int:
        return len(self._tokens())

    @property
    def answers(self) -> int:
        return len(_orders(self.things))

    @property
    def outputs(self) -> int:
        return self.answers

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        orders, tokens = _orders(self.things), self._tokens()
        inputs = torch.randint(len(tokens), (count, self.length), generator=generator)
        state = orders[:1].expand(count, -1)
        targets = torch.empty_like(inputs)
        for slot in range(self.length):
            state = state.gather(1, orders[tokens[inputs[:, slot]]])
            targets[:, slot] = (state[:, None] == orders).all(-1).long().argmax(1)
        return Batch(inputs, targets)

    def _tokens(self) -> Tensor:
        """Which of all orders are tokens, ascending; the first changes nothing."""
        orders = _orders(self.things)
        return ((orders != orders[:1]).sum(1) <= self.moved).nonzero()[:, 0]


def _orders(things: int) -> Tensor:
    """All orders of `things` things, (orders, things); the first is 0, 1, 2, ..."""
    return torch.tensor(list(permutations(range(things))))
