"""Multi-query associative recall: many keys, each with a value, and every key asked for once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnzoo.tasks.task import IGNORED, TRAINING, Batch, Task, at_least, draw_distinct

GAP_POWER = 0.01  # Zoology's: short distances between a pair and its query are the most frequent


@dataclass(frozen=True)
class MQAR(Task):
    """Arora et al. 2023, Zoology, arXiv:2312.04927, section 4 and appendix E: k1 v1 k2 v2 ..., then
    every key once more, in slots whose distance follows a power law; at such a key the answer is
    its value.

    length: tokens.
    pairs: keys with their values.
    vocabulary: tokens, half of them keys and half values, beside a blank.

    Slots between the queries are blank; Zoology fills them with random tokens of 8,192, of which
    few are a key by chance. As there, training mixes sizes: a batch has all, half or a quarter of
    the pairs. With all of them only, softmax attention stays on a plateau for a number of steps
    that differs much from seed to seed.
    """

    length: int = 64
    pairs: int = 8
    vocabulary: int = 64

    name = "mqar"
    title = "multi-query associative recall"
    form = "decoder"

    def __post_init__(self) -> None:
        self._check_positive()
        at_least(
            "length",
            self.length,
            4 * self.pairs,
            f"pairs={self.pairs} take two slots each, and so do their queries",
        )
        at_least(
            "vocabulary",
            self.vocabulary,
            2 * self.pairs,
            f"pairs={self.pairs} need as many keys, and half the vocabulary is keys",
        )

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary + 1

    @property
    def answers(self) -> int:
        return self.vocabulary // 2

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        half, pairs = self.vocabulary // 2, self.pairs
        if part == TRAINING:
            pairs = max(1, pairs >> int(torch.randint(3, (), generator=generator)))
        keys = 1 + draw_distinct(count, half, pairs, generator)
        values = 1 + half + draw_distinct(count, half, pairs, generator)
        start = 2 * pairs
        places = torch.arange(1, (self.length - start) // 2 + 1, dtype=torch.float32)
        weights = (GAP_POWER * places ** (GAP_POWER - 1)).expand(count, -1)
        slots = start + 2 * torch.multinomial(weights, pairs, generator=generator)
        inputs = torch.zeros(count, self.length, dtype=torch.long)
        inputs[:, 0:start:2], inputs[:, 1:start:2] = keys, values
        targets = torch.full_like(inputs, IGNORED)
        inputs.scatter_(1, slots, keys)
        targets.scatter_(1, slots, values)
        return Batch(inputs, targets)
