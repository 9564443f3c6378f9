"""Training results as one HTML page that needs nothing else: which attention for which task,
figures, every number, and where it ran."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.report.document import html_table, joined, results_document
from attnzoo.report.training.train_figures import drawings
from attnzoo.report.training.train_tables import matrix, problem_tables
from attnzoo.training.summary import summed_up
from attnzoo.training.training_rows import Row

TITLE = "What attention variants learn"
LEAD = (
    "One small pre-norm transformer, trained on each task with one attention after another: the "
    "same weights to start from, the same examples in the "
    "same order, the same number of steps. Every learning rate is tried with every seed; the test "
    "score is the mean over the seeds at the rate with "
    "the best mean on validation."
)


def page(rows: Sequence[Row]) -> str:
    """The whole page, deterministic in `rows`."""
    problems = summed_up(rows)
    facts = joined(row.environment for row in rows)
    return results_document(
        TITLE,
        LEAD,
        html_table(matrix(problems)),
        drawings(problems),
        problem_tables(problems),
        facts,
    )
