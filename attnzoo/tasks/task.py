"""What a task is: sequences with answers, drawn from a seed, in three parts that share no
example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from attnzoo.arguments import check_positive

Form = Literal["decoder", "encoder", "cross"]
TRAINING, VALIDATION, TEST = PARTS = ("training", "validation", "test")
GENERATORS = (
    2**32
    # Torch's generator on a CPU reads 32 bits of a seed: two that agree in them give the same
    # numbers
)
# Seeds of the held-out parts; those of training are smaller.
SEEDS = {VALIDATION: GENERATORS - 2, TEST: GENERATORS - 1}
STEPS = 1_000_003  # most steps of a run: no two (seed, step) share a generator
SEED_LIMIT = min(SEEDS.values()) // STEPS  # seeds of a run are below it
IGNORED = -100  # a target that is not asked for: what torch's cross-entropy skips


@dataclass(frozen=True)
class Batch:
    """Examples of a task.

    inputs: (batch, length) tokens.
    targets: (batch, length) answers, of an encoder (batch,); IGNORED where none is asked.
    memory: (batch, memory_length) tokens of the second sequence, of a cross task.
    mask: (batch, length) bool, True at real tokens; None: all are.
    """

    inputs: Tensor
    targets: Tensor
    memory: Tensor | None = None
    mask: Tensor | None = None

    @property
    def asked(self) -> int:
        """How many answers are asked for."""
        return int((self.targets != IGNORED).sum())

    def __getitem__(self, rows: slice) -> Batch:
        """These rows of the batch."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: None if part is None else part[rows] for name, part in parts.items()}
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{name: None if part is None else part.to(device) for name, part in parts.items()},
        )


class Task(ABC):
    """A task; its fields are its knobs.

    form: decoder (causal), encoder (a class for the whole sequence) or cross (queries from a second
    sequence).
    metric: "accuracy" of the answers, or "bits per character".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    form: ClassVar[Form]
    metric: ClassVar[str] = "accuracy"
    length: int

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of different input tokens."""

    @property
    def answers(self) -> int:
        """Number of different answers, from which chance follows."""
        return self.vocabulary_size

    @property
    def outputs(self) -> int:
        """Width of the model's output: targets are below it."""
        return self.vocabulary_size

    @property
    def is_causal(self) -> bool:
        """Whether no token may see later ones."""
        return self.form == "decoder"

    @property
    def memory_length(self) -> int | None:
        """Length of the second sequence, of a cross task."""
        return None

    @abstractmethod
    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        """`count` examples of a part, drawn with the generator."""

    def training_batch(self, count: int, seed: int, step: int) -> Batch:
        """What a run with this seed trains on at this step: a function of the two alone, whatever
        the model."""
        return self.examples(TRAINING, count, torch.Generator().manual_seed(seed * STEPS + step))

    def held_out(self, part: str, count: int) -> Batch:
        """The examples that every run is validated or tested on."""
        return self.examples(part, count, torch.Generator().manual_seed(SEEDS[part]))

    def baselines(self, count: int) -> dict[str, float]:
        """Scores on the test part without a model: chance, and always giving the most frequent
        answer of the validation part."""
        known = self.held_out(VALIDATION, count).targets
        counts = torch.bincount(known[known != IGNORED], minlength=self.outputs)
        asked = self.held_out(TEST, count).targets
        asked = asked[asked != IGNORED]
        return {
            "chance": 1 / self.answers,
            "majority answer": (asked == counts.argmax()).float().mean().item(),
        }

    @property
    def lower_is_better(self) -> bool:
        return self.metric != "accuracy"

    @classmethod
    def from_knobs(cls, knobs: dict[str, Any]) -> Self:
        """The task with these knobs. Raises ValueError on an unknown one and on a bad value."""
        from attnzoo.configuration import check_mapping

        check_mapping(f"the problem of {cls.name}", knobs, cls.knobs(), may_be_empty=True)
        return cls(**knobs)

    @classmethod
    def knobs(cls) -> list[str]:
        """Names of the knobs."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]  # every task is a dataclass

    def _check_positive(self, *others: str) -> None:
        """Raise ValueError unless every knob but these is a whole number of at least 1."""
        for name in self.knobs():
            if name not in others:
                check_positive(name, getattr(self, name))


def at_least(name: str, value: int, least: int, why: str) -> None:
    """Raise ValueError when a knob is too small for the others.

    why: what the knob has to hold, in words.
    """
    if value < least:
        raise ValueError(f"{name}={value} is too small: {why}; give at least {least}")


def draw_distinct(rows: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """(rows, count) different numbers below `choices` in every row, in random order."""
    return torch.rand(rows, choices, generator=generator).argsort(1)[:, :count]
