"""Induction: a stretch of tokens comes back, and what followed each of them follows again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.tasks.task import IGNORED, Batch, Task, at_least, draw_distinct


@dataclass(frozen=True)
class Induction(Task):
    """Olsson et al. 2022, arXiv:2209.11895: A B ... A asks for B. A stretch of different tokens
    stands somewhere in the first part of noise that has none of them and ends the sequence; from
    its second token on, the answer is the next token. The distance changes, so that only content
    finds it.

    length: tokens.
    stretch: tokens that come back.
    vocabulary: tokens.
    """

    length: int = 64
    stretch: int = 8
    vocabulary: int = 32

    name = "induction"
    title = "induction"
    form = "decoder"

    def __post_init__(self) -> None:
        self._check_positive()
        at_least("stretch", self.stretch, 2, "its first token asks for the second")
        at_least(
            "length", self.length, 2 * self.stretch, f"stretch={self.stretch} stands in it twice"
        )
        at_least(
            "vocabulary",
            self.vocabulary,
            self.stretch + 1,
            f"stretch={self.stretch} takes different tokens, and noise needs others",
        )

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        tokens = draw_distinct(count, self.vocabulary, self.vocabulary, generator)
        stretch, others = tokens[:, : self.stretch], tokens[:, self.stretch :]
        inputs = others.gather(
            1, torch.randint(others.shape[1], (count, self.length), generator=generator)
        )
        start = torch.randint(self.length - 2 * self.stretch + 1, (count, 1), generator=generator)
        inputs.scatter_(1, start + torch.arange(self.stretch), stretch)
        inputs[:, -self.stretch :] = stretch
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -self.stretch : -1] = stretch[:, 1:]
        return Batch(inputs, targets)
