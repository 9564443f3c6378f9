"""Long Range Arena's ListOps by shortcuts: how much does an answer score that reads the outer list
alone, or nothing?

    python -m benchmarks.papers.listops_shortcuts [--quick] [--redraw]

The baselines of the task `listops` at Long Range Arena's depth (nine operators inside one another;
its max_depth=10 counts the digits, too) and lists of up to 10, in four ranges of lengths of which
the last is its own, beside the accuracies in its Table 1 (Tay et al. 2020). Scored on 2,000
expressions; a score has a standard error of about one point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from attnzoo.tasks.listops import HELD_OUT, ListOps
from benchmarks.papers.study import Row, length_axis, panels, run

NAME = "listops_shortcuts"
RANGES = ((8, 32), (32, 128), (125, 500), (500, 2000))  # fewest and most tokens
DEPTH, ARGUMENTS = 9, 10
EXPRESSIONS = (
    8000  # that the answer of an operator is counted on; Long Range Arena trains on 96,000
)
#: Table 1, ListOps, in percent.
PUBLISHED = {
    "Local attention": 15.82,
    "Linear Transformer": 16.13,
    "Sparse Transformer": 17.07,
    "Performer": 18.01,
    "Sinkhorn Transformer": 33.67,
    "Longformer": 35.63,
    "Linformer": 35.70,
    "BigBird": 36.05,
    "Transformer": 36.37,
    "Synthesizer": 36.99,
    "Reformer": 37.27,
}


def measure(quick: bool) -> Iterator[Row]:
    for shortest, length in RANGES[:2] if quick else RANGES:
        task = ListOps(
            length=length,
            shortest=shortest,
            depth=DEPTH,
            arguments=ARGUMENTS,
            expressions=500 if quick else EXPRESSIONS,
        )
        for label, accuracy in task.baselines(HELD_OUT).items():
            yield {"answer": label, "shortest": shortest, "length": length, "accuracy": accuracy}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Every model of the table beside the shortcuts at the longest expressions, and the shortcuts
    against length."""
    from attnzoo.report.style import INK, MARKERS, PALETTE

    longest = max(row["length"] for row in rows)
    with panels(path) as (table, lengths):
        table.barh(list(PUBLISHED), list(PUBLISHED.values()), color="#c9ced6", height=0.7)
        for answer, color, marker in zip(
            dict.fromkeys(row["answer"] for row in rows), (INK, *PALETTE), MARKERS, strict=False
        ):
            found = [row for row in rows if row["answer"] == answer]
            percent = [100 * row["accuracy"] for row in found]
            table.axvline(
                next(100 * row["accuracy"] for row in found if row["length"] == longest),
                color=color,
                linewidth=1.4,
            )
            lengths.plot(
                [row["length"] for row in found], percent, color=color, marker=marker, label=answer
            )
        table.set_xlabel("accuracy, %")
        table.set_title("Long Range Arena's Table 1, and the shortcuts")
        length_axis(
            lengths,
            (row["length"] for row in rows),
            "most tokens of an expression (fewest: a quarter)",
        )
        lengths.set_ylim(0)
        lengths.set_ylabel("accuracy, %")
        lengths.set_title("Shortcuts, depth 9, lists of up to 10")


if __name__ == "__main__":
    run(NAME, measure, draw)
