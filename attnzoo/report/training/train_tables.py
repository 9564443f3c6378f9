"""The numbers of training as tables: one a problem, and which variant fits which task, for the
screen and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, duration, memory
from attnzoo.training.summary import Problem, Summary

COLUMNS = (
    Column("label", "attention", words=True),
    Column("test", "test"),
    Column("spread", "±"),
    Column("seeds", "seeds"),
    Column("rate", "rate", "g"),
    Column("validations", "validation by rate", words=True),
    Column("state_bytes", "state", memory),
    Column("macs", "MACs", count),
    Column("peak_bytes", "peak", memory),
    Column("seconds", "time", duration),
)
FORMULA = (
    "test: {metric}, mean over the seeds at the rate with the best mean on validation; ±: standard "
    "deviation; state: what all attentions carry in "
    "decoding after one sequence; MACs: of all attentions with their projections, one sequence, as "
    "kernels run them (a window in "
    "whole blocks); peak: of one training step; time: of a run's training steps"
)
BEST_MARK, BEST_WITHIN = " *", 0.01  # in the matrix


def problem_tables(problems: Sequence[Problem]) -> list[Table]:
    """A table a problem, the baselines first. A contender without a score is a note with its
    reason."""
    return [
        _table(number, problem, full_title(problem, problems))
        for number, problem in enumerate(problems, 1)
    ]


def full_title(problem: Problem, problems: Sequence[Problem]) -> str:
    """The task with all its knobs and, beside problems with the same ones, enough of what else they
    differ in."""
    twins = [settings_of(other) for other in problems if other.title == problem.title]
    return " ".join(
        [
            problem.title,
            *(f"{name}={value}" for name, value in telling(settings_of(problem), twins).items()),
        ]
    )


def score(value: float | None, metric: str) -> str:
    """A score as a reader sees it: 97.3% or 2.13."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.3f}"


def matrix(problems: Sequence[Problem]) -> Table:
    """Test scores, a row a contender, baselines first, and a column a problem; a dash where it was
    skipped or not tried."""
    contenders = sorted(
        (one for problem in problems for one in problem.contenders),
        key=lambda one: not one.is_baseline,
    )
    labels = list(dict.fromkeys(contender.label for contender in contenders))
    found = [
        {contender.label: contender for contender in problem.contenders} for problem in problems
    ]
    rows = tuple(
        {
            "label": label,
            **{
                str(number): _cell(problems[number], by.get(label))
                for number, by in enumerate(found)
            },
        }
        for label in labels
    )
    headings = [
        Column(str(number), short_title(problem, problems))
        for number, problem in enumerate(problems)
    ]
    formula = (
        "mean test score over the seeds: accuracy in percent, where more is better, and bits per "
        "character on shakespeare, where less is; "
        f"{BEST_MARK}: the best of the column, or within {BEST_WITHIN:.0%} of it; -: skipped or "
        "not tried"
    )
    return Table("matrix", "Which attention for which task", formula, (COLUMNS[0], *headings), rows)


def _cell(problem: Problem, contender: Summary | None) -> str | None:
    if contender is None or contender.test is None:
        return None
    tests = [one.test for one in problem.contenders if one.test is not None and not one.is_baseline]
    if problem.lower_is_better:
        is_best = contender.test <= min(tests, default=0.0) * (1 + BEST_WITHIN)
    else:
        is_best = contender.test >= max(tests, default=2.0) * (1 - BEST_WITHIN)
    return score(contender.test, problem.metric) + (
        BEST_MARK if is_best and not contender.is_baseline else ""
    )


def short_title(problem: Problem, problems: Sequence[Problem]) -> str:
    """The task, knobs enough to tell its problems apart, and of problems with the same knobs enough
    of what else they differ in."""
    same = [other for other in problems if other.task == problem.task]
    twins = [settings_of(other) for other in same if other.knobs == problem.knobs]
    told = {
        **telling(problem.knobs, [other.knobs for other in same]),
        **telling(settings_of(problem), twins),
    }
    return " ".join([problem.task, *(f"{name}={value}" for name, value in told.items())])


def settings_of(problem: Problem) -> dict[str, Any]:
    """Of its study: model, budget and how much is held out."""
    return {**problem.model, **problem.budget, "held_out": problem.held_out}


def telling(settings: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As few of the settings as tell the others apart, the first ones rather than the last."""

    def kinds(names: Sequence[str]) -> int:
        return len({tuple(str(other.get(name)) for name in names) for other in others})

    told = list(settings)
    for name in reversed(settings):
        rest = [other for other in told if other != name]
        if kinds(rest) == kinds(told):
            told = rest
    return {name: settings[name] for name in told}


def _table(number: int, problem: Problem, title: str) -> Table:
    shown = [contender for contender in problem.contenders if contender.test is not None]
    notes = [
        f"{contender.label}: {contender.reason}"
        for contender in problem.contenders
        if contender.reason
    ]
    rows = tuple(_numbers(contender, problem.metric) for contender in shown)
    return Table(
        f"problem-{number}",
        title,
        FORMULA.format(metric=problem.metric),
        COLUMNS,
        rows,
        settings_of(problem),
        tuple(notes),
    )


def _numbers(contender: Summary, metric: str) -> dict[str, Any]:
    tried = ", ".join(
        f"{rate:g}: {score(value, metric) if value is not None else 'not finite'}"
        for rate, value in contender.validations.items()
    )
    return {
        "label": contender.label,
        "test": score(contender.test, metric),
        "spread": None if contender.spread is None else score(contender.spread, metric),
        "seeds": contender.seeds or None,
        "rate": contender.learning_rate,
        "validations": tried or None,
        "state_bytes": contender.state_bytes,
        "macs": contender.macs,
        "peak_bytes": contender.peak_bytes,
        "seconds": contender.seconds,
    }
