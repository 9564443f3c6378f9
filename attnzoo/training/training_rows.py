"""One line of a training study: one run, one baseline, or why a contender has neither."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from attnzoo.results.result_file import fields_of

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """One run, one baseline, or a contender that has neither. None where there is no number;
    `reason` then says why.

    task, problem: the task and its knobs.
    model, budget, held_out: as in the study.
    label, layers: the contender, and its parts as [name, options]; a baseline has no layers, rate
    or seed.
    validation, test: scores in `metric`, after the last step.
    validation_loss: nats.
    curve: (steps done, mean training loss since the point before).
    validations: (steps done, score).
    stopped_at: the step, from 0, with a loss or gradient that was not finite, or after which the
    loss of held-out examples was not.
    seconds: of the training steps.
    macs: of all mixers with their projections, for one sequence, as kernels run them.
    peak_bytes: of one training step.
    state_bytes: what all mixers carry in decoding after one sequence.
    parameters: learned numbers.
    """

    FORMAT: ClassVar[str] = "attnzoo.train/1"
    COMMAND: ClassVar[str] = "attnzoo train"

    task: str
    problem: dict[str, Any]
    model: dict[str, Any]
    budget: dict[str, Any]
    held_out: int
    metric: str
    label: str
    layers: list[list[Any]]
    learning_rate: float | None = None
    seed: int | None = None
    validation: float | None = None
    validation_loss: float | None = None
    test: float | None = None
    curve: list[list[float]] | None = None
    validations: list[list[float]] | None = None
    stopped_at: int | None = None
    seconds: float | None = None
    macs: int | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None
    parameters: int | None = None
    reason: str = ""
    environment: dict[str, str] | None = None

    @property
    def group(self) -> Key:
        """What rows must share to stand in one table."""
        return (
            self.task,
            *(json.dumps(part, sort_keys=True) for part in (self.problem, self.model, self.budget)),
            self.held_out,
        )

    @property
    def key(self) -> Key:
        """What the row is about: two rows with one key are of one run."""
        return (
            *self.group,
            self.label,
            json.dumps(self.layers, sort_keys=True),
            self.learning_rate,
            self.seed,
        )

    @property
    def is_baseline(self) -> bool:
        """Whether no model was trained for it."""
        return not self.layers

    @property
    def variant(self) -> str:
        """The contender's name without options; of a baseline and of layers that take turns the
        label."""
        return self.layers[0][0] if len(self.layers) == 1 else self.label

    def to_json(self) -> str:
        """One line of the result file."""
        return json.dumps(
            {"format": self.FORMAT, **asdict(self)}, allow_nan=False, ensure_ascii=False
        )

    @classmethod
    def from_fields(cls, found: dict[str, Any]) -> Row:
        """The row of a parsed line."""
        return cls(**fields_of(cls, found))
