"""What a study found: for every contender its best rate, the mean and spread of its test scores over the seeds, and its costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, stdev
from typing import Any

from attnzoo.tasks.rows import Key, Row
from attnzoo.tasks.run import best_of


@dataclass(frozen=True)
class Summary:
    """One contender on one problem. validations: by learning rate, of the first seed; None: that run's loss was not finite. test: mean
    over the seeds at the best rate; spread: their standard deviation (n - 1), None of one seed. seconds: mean of a run."""

    label: str
    variant: str
    is_baseline: bool
    learning_rate: float | None = None
    validations: dict[float, float | None] = field(default_factory=dict)
    test: float | None = None
    spread: float | None = None
    seeds: int = 0
    seconds: float | None = None
    macs: int | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Problem:
    """All contenders on one task with its knobs, one model and one budget. rows: those they were summed up from."""

    task: str
    knobs: dict[str, Any]
    model: dict[str, Any]
    budget: dict[str, Any]
    held_out: int
    metric: str
    contenders: tuple[Summary, ...]
    rows: tuple[Row, ...] = ()

    @property
    def title(self) -> str:
        """Such as "mqar, length=64 pairs=8"."""
        return f"{self.task}, {' '.join(f'{name}={value}' for name, value in self.knobs.items())}"

    @property
    def lower_is_better(self) -> bool:
        return self.metric != "accuracy"

    def best_rows(self, label: str) -> list[Row]:
        """The runs of a contender at its best rate."""
        best = next(contender.learning_rate for contender in self.contenders if contender.label == label)
        return [row for row in self.rows if row.label == label and row.learning_rate == best and row.curve]

    def to_json(self) -> dict[str, Any]:
        """The summary alone, as JSON holds it."""
        found = asdict(self)
        del found["rows"]
        for contender in found["contenders"]:
            contender["validations"] = {str(rate): score for rate, score in contender["validations"].items()}
        return found


def summed_up(rows: Iterable[Row]) -> list[Problem]:
    """The problems of the rows, in order of appearance; in each the baselines first."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [_problem(found) for found in groups.values()]


def _problem(rows: list[Row]) -> Problem:
    first = rows[0]
    by_label: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        by_label.setdefault((not row.is_baseline, row.label), []).append(row)
    ordered = sorted(by_label.items(), key=lambda item: item[0][0])
    contenders = tuple(_summary(found) for _, found in ordered)
    return Problem(first.task, first.problem, first.model, first.budget, first.held_out, first.metric, contenders, tuple(rows))


def _tried(runs: list[Row]) -> list[Row]:
    """Those of the seed that the rate was chosen with: it has run at more rates than others; of equal ones the first. A result file may hold runs of
    other seeds from an earlier study."""
    by_seed: dict[int | None, list[Row]] = {}
    for row in runs:
        by_seed.setdefault(row.seed, []).append(row)
    return max(by_seed.values(), key=len)


def _summary(rows: list[Row]) -> Summary:
    first = rows[0]
    runs = [row for row in rows if row.learning_rate is not None]
    if not runs:
        return Summary(first.label, first.variant, first.is_baseline, test=first.test, reason=first.reason)
    tried = _tried(runs)
    found = Summary(
        first.label,
        first.variant,
        first.is_baseline,
        validations={row.learning_rate: row.validation for row in tried if row.learning_rate is not None},
        macs=runs[0].macs,
        peak_bytes=runs[0].peak_bytes,
        state_bytes=runs[0].state_bytes,
        reason="; ".join(f"rate {row.learning_rate:g}, seed {row.seed}: {row.reason}" for row in runs if row.reason),
    )
    best = best_of(tried, first.metric != "accuracy")
    if best is None:
        return found
    chosen = [row for row in runs if row.learning_rate == best.learning_rate and row.test is not None]
    tests = [row.test for row in chosen if row.test is not None]
    return replace(
        found,
        learning_rate=best.learning_rate,
        test=mean(tests),
        spread=stdev(tests) if len(tests) > 1 else None,
        seeds=len(tests),
        seconds=mean(row.seconds for row in chosen if row.seconds is not None),
    )
