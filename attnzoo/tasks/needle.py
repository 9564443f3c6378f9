"""Needle: one fact in long noise, asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.tasks.task import IGNORED, Batch, Task, at_least


@dataclass(frozen=True)
class Needle(Task):
    """Noise with one marker in it, anywhere; the token behind the marker is the fact. The marker at
    the end asks for it. (The single associative lookup of Fu et al. 2023, H3, arXiv:2212.14052,
    section 3.1, under the name that long-context tests gave it.)

    length: tokens.
    vocabulary: symbols of the noise and of the fact.
    """

    length: int = 64
    vocabulary: int = 16

    name = "needle"
    title = "one fact in noise"
    form = "decoder"

    def __post_init__(self) -> None:
        self._check_positive()
        at_least("length", self.length, 3, "it holds the marker, the fact and the question")

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary + 1

    @property
    def answers(self) -> int:
        return self.vocabulary

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        inputs = torch.randint(1, self.vocabulary + 1, (count, self.length), generator=generator)
        place = torch.randint(self.length - 2, (count, 1), generator=generator)
        inputs.scatter_(1, place, 0)
        inputs[:, -1] = 0
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = inputs.gather(1, place + 1)[:, 0]
        return Batch(inputs, targets)
