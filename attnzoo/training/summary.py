"""What a study found: for every contender its best rate, the mean and spread of its test scores
over the seeds, and its costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, stdev
from typing import Any

from attnzoo.training.training_rows import Key, Row


@dataclass(frozen=True)
class Summary:
    """One contender on one problem.

    validations: mean over the seeds by learning rate; None: the loss of one of the runs was not
    finite.
    test: mean over the seeds at the rate with the best of them.
    spread: their standard deviation (n - 1), None of one seed.
    seconds: mean of a run.
    """

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
    """All contenders on one task with its knobs, one model and one budget.

    rows: those they were summed up from.
    """

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
        best = next(
            contender.learning_rate for contender in self.contenders if contender.label == label
        )
        return [
            row
            for row in self.rows
            if row.label == label and row.learning_rate == best and row.curve
        ]

    def to_json(self) -> dict[str, Any]:
        """The summary alone, as JSON holds it."""
        found = asdict(self)
        del found["rows"]
        for contender in found["contenders"]:
            contender["validations"] = {
                str(rate): score for rate, score in contender["validations"].items()
            }
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
    return Problem(
        first.task,
        first.problem,
        first.model,
        first.budget,
        first.held_out,
        first.metric,
        contenders,
        tuple(rows),
    )


def _compared(runs: list[Row]) -> dict[float, list[Row]]:
    """By learning rate, the runs of those seeds that have run at every rate.

    An interrupted study, or a result file that others have added to, may hold more runs of one rate
    than of another. When no seed has run at all rates: the runs of the seeds with most rates, at
    only those rates.
    """
    rates: dict[int | None, set[float]] = {}
    for row in runs:
        rates.setdefault(row.seed, set()).add(row.learning_rate or 0.0)
    most = max(rates.values(), key=len)
    seeds = [seed for seed, found in rates.items() if found == most]
    return {
        rate: [row for row in runs if row.learning_rate == rate and row.seed in seeds]
        for rate in sorted(most)
    }


def best_rate(tried: dict[float, list[Row]], lower_is_better: bool) -> float | None:
    """The rate with the best mean score on validation, of equal ones the one with the smaller loss;
    None when no run was finite.

    A rate at which more runs were not finite than at another comes after it.
    """

    def rank(rate: float) -> tuple[int, float, float]:
        ended = [row for row in tried[rate] if row.validation is not None]
        score, loss = (
            mean(row.validation or 0.0 for row in ended),
            mean(row.validation_loss or 0.0 for row in ended),
        )
        return len(tried[rate]) - len(ended), score if lower_is_better else -score, loss

    return min(
        (rate for rate, rows in tried.items() if any(row.validation is not None for row in rows)),
        key=rank,
        default=None,
    )


def _mean_validation(rows: list[Row]) -> float | None:
    scores = [row.validation for row in rows if row.validation is not None]
    return mean(scores) if len(scores) == len(rows) else None


def _summary(rows: list[Row]) -> Summary:
    first = rows[0]
    runs = [row for row in rows if row.learning_rate is not None]
    if not runs:
        return Summary(
            first.label, first.variant, first.is_baseline, test=first.test, reason=first.reason
        )
    tried = _compared(runs)
    found = Summary(
        first.label,
        first.variant,
        first.is_baseline,
        validations={rate: _mean_validation(rows) for rate, rows in tried.items()},
        macs=runs[0].macs,
        peak_bytes=runs[0].peak_bytes,
        state_bytes=runs[0].state_bytes,
        reason="; ".join(
            f"rate {row.learning_rate:g}, seed {row.seed}: {row.reason}"
            for row in runs
            if row.reason
        ),
    )
    best = best_rate(tried, first.metric != "accuracy")
    if best is None:
        return found
    chosen = [row for row in runs if row.learning_rate == best and row.test is not None]
    tests = [row.test for row in chosen if row.test is not None]
    return replace(
        found,
        learning_rate=best,
        test=mean(tests),
        spread=stdev(tests) if len(tests) > 1 else None,
        seeds=len(tests),
        seconds=mean(row.seconds for row in chosen if row.seconds is not None),
    )
