"""What a long run says while it works, on standard error: remarks, and how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

#: Called with (what is being done, steps done, steps).
Progress = Callable[[str, int, int], None]


def say(remark: str) -> None:
    """One line on standard error."""
    print(remark, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[Progress]:
    """A bar on a terminal, a line per step elsewhere, nothing where it shall not be shown. The bar
    is drawn between steps only: a drawing thread would disturb the timings."""
    if not shown:
        yield lambda stage, done, total: None
        return
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda stage, done, total: say(f"[{done}/{total}] {stage}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True, highlight=False, emoji=False)
    with Bar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total, refresh=True)

        yield report
