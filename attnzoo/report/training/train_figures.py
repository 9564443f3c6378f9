"""Figures of training: score against state and against MACs, learning curves, and score against a
knob of the task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from attnzoo.report.axes import log_axis
from attnzoo.report.bench.bench_figures import memory_tick
from attnzoo.report.figures import Drawing, Look, chart, count_tick, plot
from attnzoo.report.style import INK, styles
from attnzoo.report.training.train_tables import settings_of, short_title, telling
from attnzoo.training.summary import Problem, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Number = Callable[[Summary], int | None]
NEAR, RING = (
    0.04,
    4,
    # Points so near, in decades and in score, are drawn as rings around the later ones; points of a
    # marker
)
FAR = 0.2  # of the worst model's bits, or of the models' span: baselines beyond it are not drawn
# Lines of the baselines, more than any task has.
GUESSES = (":", "--", "-.", (0, (5, 1)), (0, (1, 3)), (0, (4, 2, 1, 2, 1, 2)))


def drawings(problems: Sequence[Problem]) -> list[Drawing]:
    """The figures that the problems have numbers for."""
    look = styles(
        (one.variant, one.label)
        for problem in problems
        for one in problem.contenders
        if not one.is_baseline
    )
    each = {short_title(problem, problems): [problem] for problem in problems if _trained(problem)}
    level = (
        "Level lines: what needs no model; where less is better, those far behind stand in the "
        "tables alone."
    )
    front = f"The grey line is the Pareto front; bars: standard deviation over the seeds. {level}"
    charts = [
        chart(
            "state",
            "Score against the state of decoding",
            f"What is carried after one sequence, all layers, beside the test score. {front}",
            {
                title: found
                for title, found in each.items()
                if any(one.state_bytes for one in _trained(found[0]))
            },
            look,
            partial(_against, number=lambda one: one.state_bytes, label="state", tick=memory_tick),
        ),
        chart(
            "state-by-variant",
            "What more state buys",
            "Models of several sizes and attentions with several options, beside what each carries "
            "after one sequence, all layers. A line joins "
            "those of one attention that no smaller state of its own reaches; bars: standard "
            "deviation over the seeds.",
            _grown(problems),
            styles((one.variant, one.variant) for problem in problems for one in _trained(problem)),
            _against_by_variant,
        ),
        chart(
            "macs",
            "Score against multiply-accumulates",
            "Of all attentions with their projections, on one sequence, beside the test score. "
            f"{front}",
            each,
            look,
            partial(_against, number=lambda one: one.macs, label="MACs", tick=count_tick),
        ),
        chart(
            "knob",
            "Score against what is turned",
            "Mean test score over the seeds, each at its best learning rate.",
            _turned(problems),
            look,
            _against_knob,
        ),
        chart(
            "curves",
            "Learning curves",
            "Score on validation while training, mean over the seeds at the best learning rate. "
            f"{level}",
            each,
            look,
            _curves,
        ),
    ]
    return [drawing for drawing in charts if drawing is not None]


def pareto_front(
    points: Iterable[tuple[float, float]], lower_is_better: bool
) -> list[tuple[float, float]]:
    """(cost, score) of the points that no other beats in both, by rising cost."""
    sign = 1 if lower_is_better else -1
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * score < sign * front[-1][1]:
            front.append((cost, score))
    return front


def turned_knob(problems: Sequence[Problem]) -> str | None:
    """The one knob in which problems of one study differ; None when they differ in none or in
    several."""
    knobs = {name for problem in problems for name in problem.knobs}
    differing = [
        name for name in knobs if len({problem.knobs.get(name) for problem in problems}) > 1
    ]
    return differing[0] if len(differing) == 1 else None


def _trained(problem: Problem) -> list[Summary]:
    return [one for one in problem.contenders if not one.is_baseline and one.test is not None]


def _turned(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """The problems of every study (a task, one model and one budget) in which one knob is
    turned."""
    studies: dict[str, list[Problem]] = {}
    for problem in problems:
        studies.setdefault(
            str((problem.task, problem.model, problem.budget, problem.held_out)), []
        ).append(problem)
    turned = [found for found in studies.values() if turned_knob(found) is not None]
    return {
        _study_title(
            found[0], [other[0] for other in turned if other[0].task == found[0].task]
        ): found
        for found in turned
    }


def _grown(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """The problems on which models of several sizes were trained, with one budget, and whose state
    is known."""
    alike: dict[str, list[Problem]] = {}
    for problem in problems:
        if any(one.state_bytes for one in _trained(problem)):
            alike.setdefault(
                str((problem.task, problem.knobs, problem.budget, problem.held_out)), []
            ).append(problem)
    grown = [found for found in alike.values() if len(found) > 1]
    return {short_title(found[0], [other[0] for other in grown]): found for found in grown}


def _study_title(problem: Problem, others: Sequence[Problem]) -> str:
    """The task, and what tells its studies apart."""
    told = telling(settings_of(problem), list(map(settings_of, others)))
    return " ".join([problem.task, *(f"{name}={value}" for name, value in told.items())])


def _against(
    axes: Axes,
    problems: list[Problem],
    look: Look,
    *,
    number: Number,
    label: str,
    tick: Callable[[float], str],
) -> None:
    (problem,) = problems
    shown = [
        (one, float(number(one) or 0), one.test)
        for one in _trained(problem)
        if number(one) and one.test is not None
    ]
    front = pareto_front(((cost, test) for _, cost, test in shown), problem.lower_is_better)
    plot(axes, front, color=INK, alpha=0.35, linewidth=3, drawstyle="steps-post", zorder=1)
    for index, (one, cost, test) in enumerate(shown):
        covers = sum(
            abs(math.log10(cost / other)) < NEAR and abs(test - seen) < NEAR
            for _, other, seen in shown[index + 1 :]
        )
        options = look[one.label].point_options()
        plot(axes, [], label=one.label, **options)  # for the legend, where all are of one size
        plot(
            axes,
            [(cost, test)],
            zorder=3,
            **{**options, "markersize": options["markersize"] + RING * covers},
        )
        _spread(axes, cost, one, look[one.label].color, problem)
    log_axis(axes, "x", [cost for _, cost, _ in shown], tick)
    axes.set_xlabel(label)
    _score_axis(axes, problem)


def _against_by_variant(axes: Axes, problems: list[Problem], look: Look) -> None:
    found: dict[str, list[Summary]] = {}
    for one in (one for problem in problems for one in _trained(problem) if one.state_bytes):
        found.setdefault(one.variant, []).append(one)
    for variant, ones in found.items():
        points = [(float(one.state_bytes or 0), one.test or 0.0) for one in ones]
        front = pareto_front(points, problems[0].lower_is_better)
        plot(axes, front, color=look[variant].color, linewidth=1.6, alpha=0.6, zorder=1)
        plot(axes, points, label=variant, zorder=3, **look[variant].point_options())
        for one, (state, _) in zip(ones, points, strict=True):
            _spread(axes, state, one, look[variant].color, problems[0])
    log_axis(
        axes,
        "x",
        [float(one.state_bytes or 0) for ones in found.values() for one in ones],
        memory_tick,
    )
    axes.set_xlabel("state")
    _score_axis(axes, problems[0])


def _spread(axes: Axes, x: float, one: Summary, color: str, problem: Problem) -> None:
    """A bar over the standard deviation, of an accuracy no longer than there are accuracies."""
    if one.spread and one.test is not None:
        low, high = one.test - one.spread, one.test + one.spread
        axes.vlines(
            x,
            *((low, high) if problem.lower_is_better else (max(low, 0.0), min(high, 1.0))),
            color=color,
            linewidth=1.6,
        )


def _curves(axes: Axes, problems: list[Problem], look: Look) -> None:
    (problem,) = problems
    for one in _trained(problem):
        points: dict[float, list[float]] = {}
        for row in problem.best_rows(one.label):
            for steps, score in row.validations or []:
                points.setdefault(steps, []).append(score)
        plot(
            axes,
            [(steps, mean(scores)) for steps, scores in sorted(points.items())],
            label=one.label,
            **look[one.label].line_options(),
        )
    axes.set_xlabel("steps")
    _score_axis(axes, problem)


def _against_knob(axes: Axes, problems: list[Problem], look: Look) -> None:
    knob = turned_knob(problems) or ""
    ordered = sorted(problems, key=lambda problem: problem.knobs[knob])
    for label in look:
        found = [
            (problem.knobs[knob], one.test)
            for problem in ordered
            for one in _trained(problem)
            if one.label == label
        ]
        if found:
            plot(axes, found, label=label, **look[label].line_options())
    values = [problem.knobs[knob] for problem in ordered]
    log_axis(axes, "x", values, lambda value: f"{value:,.0f}")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.set_xlabel(knob)
    axes.set_ylabel(_metric(ordered[0]))


def _score_axis(axes: Axes, problem: Problem) -> None:
    """The baselines as level lines, and the metric."""
    lines = dict(
        zip((one.label for one in problem.contenders if one.is_baseline), GUESSES, strict=False)
    )
    for one in level_lines(problem):
        axes.axhline(
            one.test or 0.0, color=INK, linestyle=lines[one.label], linewidth=1.0, label=one.label
        )
    axes.set_ylabel(_metric(problem))


def level_lines(problem: Problem) -> list[Summary]:
    """The baselines to draw. Bits have no upper end: chance, several times as many as any model
    needs, would press the models together."""
    found = [one for one in problem.contenders if one.is_baseline and one.test is not None]
    tests = [one.test for one in _trained(problem) if one.test is not None]
    if not problem.lower_is_better or not tests:
        return found
    worst = max(tests)
    return [
        one
        for one in found
        if one.test is not None and one.test <= worst + max(worst - min(tests), FAR * worst)
    ]


def _metric(problem: Problem) -> str:
    return f"{problem.metric} ({'lower' if problem.lower_is_better else 'higher'} is better)"
