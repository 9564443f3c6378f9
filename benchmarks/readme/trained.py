"""The files of `attnzoo train` in results/tasks as tables: all tasks of one size side by side, and
one task with its costs."""

from __future__ import annotations

from attnzoo.report.training.train_tables import BEST_MARK, full_title, matrix, score
from attnzoo.results.result_file import read_rows
from attnzoo.results.units import count, memory
from attnzoo.training.summary import Summary, summed_up
from attnzoo.training.training_rows import Row
from benchmarks.readme.files import RESULTS
from benchmarks.readme.regions import markdown_table

TASKS = RESULTS / "tasks"


def tasks(size: str) -> str:
    """Test scores of a size, a row a contender and a column a problem; nothing where it was skipped
    or not tried, the best in bold."""
    paths = sorted(TASKS.glob(f"*-{size}.jsonl"))
    table = matrix(summed_up(row for path in paths for row in read_rows(path, Row)))
    headings = ["", *(column.heading for column in table.columns[1:])]
    rows = [
        [row["label"], *(_shown(row[column.key]) for column in table.columns[1:])]
        for row in table.rows
    ]
    return markdown_table(headings, [row for row in rows if any(row[1:])])


def task(file: str) -> str:
    """A table for each problem of one file: score, its spread over the seeds, the rate, and what it
    cost."""
    problems = summed_up(read_rows(TASKS / f"{file}.jsonl", Row))
    titles = [
        f"**{full_title(problem, problems)}**\n\n" if len(problems) > 1 else ""
        for problem in problems
    ]
    tables = []
    for problem in problems:
        headings = [
            "",
            problem.metric,
            "seeds",
            "rate",
            "state after a sequence",
            "MACs of a sequence",
        ]
        tables.append(
            markdown_table(
                headings,
                [_cells(one, problem.metric) for one in problem.contenders if one.test is not None],
            )
        )
    return "\n\n".join(title + table for title, table in zip(titles, tables, strict=True))


TABLES = {"tasks": tasks, "task": task}


def _cells(one: Summary, metric: str) -> list[str]:
    spread = f" ± {score(one.spread, metric)}" if one.spread is not None else ""
    known = (
        []
        if one.is_baseline
        else [str(one.seeds), f"{one.learning_rate:g}", memory(one.state_bytes), count(one.macs)]
    )
    return [one.label, score(one.test, metric) + spread, *(known or [""] * 4)]


def _shown(cell: str | None) -> str:
    """The best of a column in bold."""
    return (
        ""
        if cell is None
        else f"**{cell.removesuffix(BEST_MARK)}**"
        if cell.endswith(BEST_MARK)
        else cell
    )
