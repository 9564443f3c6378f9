"""Training results as one HTML page that needs nothing else: which attention for which task,
figures, every number, and where it ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from attnzoo.report.document import joined, results_document
from attnzoo.report.result import Result
from attnzoo.report.training.train_figures import drawings
from attnzoo.report.training.train_tables import matrix, problem_tables
from attnzoo.training.summary import Problem, summed_up
from attnzoo.training.training_rows import Row

TITLE = "What attention variants learn"
LEAD = (
    "One small pre-norm transformer, trained on each task with one attention after another: the "
    "same weights to start from, the same examples in the "
    "same order, the same number of steps. Every learning rate is tried with every seed; the test "
    "score is the mean over the seeds at the rate with "
    "the best mean on validation."
)


def training_result(rows: Sequence[Row], interrupted: str = "") -> Result:
    """Runs with their tables, figures and page, and a JSON file of each task's scores."""
    problems = summed_up(rows)
    return Result(
        "train",
        tuple(rows),
        (*problem_tables(problems), matrix(problems)),
        lambda: drawings(problems),
        lambda: page(rows),
        {
            f"train-{task}.json": partial(summary_json, problems, task)
            for task in dict.fromkeys(problem.task for problem in problems)
        },
        interrupted,
    )


def summary_json(problems: Sequence[Problem], task: str) -> str:
    """The scores of a task's problems as JSON."""
    found = [problem.to_json() for problem in problems if problem.task == task]
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def page(rows: Sequence[Row]) -> str:
    """The whole page, deterministic in `rows`."""
    problems = summed_up(rows)
    facts = joined(row.environment for row in rows)
    return results_document(
        TITLE,
        LEAD,
        matrix(problems).to_html(),
        drawings(problems),
        problem_tables(problems),
        facts,
    )
