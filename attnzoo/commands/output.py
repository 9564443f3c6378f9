"""Where results go: a folder that is known to be writable before the work, and files that are whole
or not there; and how long a command still has to go, on standard error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attnzoo.commands.command import messages
from attnzoo.results.result_file import ResultFile, ResultRow

if TYPE_CHECKING:
    from rich.console import Console

Row = TypeVar("Row", bound=ResultRow)
Progress = Callable[[str, int, int], None]


def check_folder(path: str | Path) -> Path:
    """Make the folder if need be and try to write into it. Raises ValueError, one sentence, when
    that fails."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise ValueError(f"output={str(folder)!r} is a file; give a folder with --output") from None
    except OSError as error:
        raise ValueError(
            f"output={str(folder)!r} cannot be written ({error.strerror}); give another folder "
            "with --output"
        ) from None
    return folder


def write_text(path: Path, text: str) -> Path:
    """Write the whole file or, when interrupted, none of it."""
    half = path.with_name(f".{path.name}.part")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
    return path


def open_results(path: Path, kind: type[Row]) -> ResultFile[Row]:
    """A result file to go on with, repaired if it was cut. Raises ValueError on a file of another
    kind, before it is touched."""
    results = ResultFile(path, kind)
    results.rows()
    said = results.repair()
    if said is not None:
        messages().print(f"attnzoo: {said}", soft_wrap=True)
    return results


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, a line per step elsewhere. It is drawn between steps only: a drawing
    thread would disturb the timings."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: console.print(f"[{done}/{total}] {stage}", soft_wrap=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total, refresh=True)

        yield report
