"""Running a plan: a row for each setting and contender that the result file does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from attnzoo.benchmarking.bench_rows import Key, Row, blank_row
from attnzoo.benchmarking.measure_setting import Bench
from attnzoo.benchmarking.plan import Plan
from attnzoo.registry import ParseChoice

Progress = Callable[[str, int, int], None]


def run_plan(
    plan: Plan, parse: ParseChoice, device: torch.device, finished: set[Key], progress: Progress
) -> Iterator[Row]:
    """The rows of a plan as they finish, without those whose key is `finished`.

    progress: called with (what comes, settings done, settings).
    Raises DeviceLost after the row of the contender that a CUDA device did not survive.
    """
    work = [(sweep, cell) for sweep in plan.sweeps for cell in sweep.cells()]
    contenders = {id(sweep): sweep.contenders(parse) for sweep in plan.sweeps}
    bench = Bench(device, plan.seed)
    done = set(finished)
    for number, (sweep, cell) in enumerate(work):
        progress(cell.title(), number, len(work))
        missing = [
            contender
            for contender in contenders[id(sweep)]
            if blank_row(contender, cell).key not in done
        ]
        if not missing and blank_row(None, cell).key in done:
            continue
        for row in bench.measure(cell, missing, sweep.rounds, sweep.budget):
            if row.key not in done:
                done.add(row.key)
                yield row
    progress("done", len(work), len(work))


def planned(plan: Plan, parse: ParseChoice) -> set[Key]:
    """The keys of all rows of a plan, with those of SDPA called directly."""
    return {
        blank_row(contender, cell).key
        for sweep in plan.sweeps
        for contender in (None, *sweep.contenders(parse))
        for cell in sweep.cells()
    }
