"""Lookup: facts in the noise of one sequence, asked for by another. Cross attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.tasks.task import Batch, Task, at_least, draw_distinct


@dataclass(frozen=True)
class Lookup(Task):
    """A memory of noise in which every key stands once, anywhere, with its value behind it; a
    second sequence names all keys in random order, and the answer to each is its value.

    length: tokens of the memory.
    facts: keys, and queries.
    vocabulary: symbols of the noise and of the values.
    """

    length: int = 64
    facts: int = 8
    vocabulary: int = 16

    name = "lookup"
    title = "facts in another sequence"
    form = "cross"

    def __post_init__(self) -> None:
        self._check_positive()
        at_least("length", self.length, 2 * self.facts, f"facts={self.facts} take two slots each")

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary + self.facts

    @property
    def answers(self) -> int:
        return self.vocabulary

    @property
    def memory_length(self) -> int:
        return self.length

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        memory = torch.randint(self.vocabulary, (count, self.length), generator=generator)
        slots = 2 * draw_distinct(count, self.length // 2, self.facts, generator)
        keys = self.vocabulary + torch.arange(self.facts).expand(count, -1)
        memory.scatter_(1, slots, keys)
        values = memory.gather(1, slots + 1)
        order = draw_distinct(count, self.facts, self.facts, generator)
        return Batch(keys.gather(1, order), values.gather(1, order), memory)
