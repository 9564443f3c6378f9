"""Copy: repeat what was read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.arguments import check_positive
from attnzoo.tasks.task import IGNORED, Batch, Task, at_least


@dataclass(frozen=True)
class Copy(Task):
    """Random symbols, a separator, and the symbols again; from the separator on, the answer is the
    next symbol. The distance is fixed, so that position alone can solve it.

    length: tokens, half of them (rounded down) the symbols to copy.
    vocabulary: symbols.
    """

    length: int = 64
    vocabulary: int = 32

    name = "copy"
    title = "copy"
    form = "decoder"

    def __post_init__(self) -> None:
        self._check_positive()
        at_least(
            "length",
            check_positive("length", self.length),
            2,
            "it holds a symbol and the separator",
        )

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary + 1

    @property
    def answers(self) -> int:
        return self.vocabulary

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        half = self.length // 2
        symbols = torch.randint(1, self.vocabulary + 1, (count, half), generator=generator)
        separator = torch.zeros(count, 1, dtype=torch.long)
        inputs = torch.cat([symbols, separator, symbols[:, :-1]], 1)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, half:] = symbols
        return Batch(inputs, targets)
