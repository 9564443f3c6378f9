"""attnzoo report FILES: result files of `attnzoo bench` or of `attnzoo train` as figures and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, screen
from attnzoo.commands.output import check_folder, write_text

if TYPE_CHECKING:
    from attnzoo.report.figures import Drawing


def add_arguments(parser: ArgumentParser) -> None:
    """The result files, and where the page goes."""
    parser.add_argument(
        "files",
        nargs="+",
        type=str,
        metavar="FILE",
        help="result files of `attnzoo bench`, or of `attnzoo train`; the rows of one table are of one machine",
    )
    parser.add_argument("--output", type=str, default="report", metavar="FOLDER", help="gets bench.html or train.html, and the figures")


def run(settings: Namespace) -> int:
    """Read all files, then write the figures and the page."""
    from attnzoo.report.export import write_figures
    from attnzoo.results import read_rows
    from attnzoo.tasks.rows import Row as TrainRow

    trained = _starts_with(settings.files[0], f'{{"format": "{TrainRow.FORMAT}"')
    name, kind, table_of, page, drawings = _training() if trained else _benchmark()
    lots = {path: read_rows(path, kind) for path in settings.files}
    for path, rows in lots.items():
        if not rows:
            raise ValueError(f"{path} holds no rows; give a file that `{kind.COMMAND}` wrote")
    _check_machines(lots, table_of)
    rows = list({row.key: row for rows in lots.values() for row in rows}.values())
    folder = check_folder(settings.output)
    for path in [write_text(folder / f"{name}.html", page(rows)), *write_figures(drawings(rows), folder, f"{name}-")]:
        screen().print(f"wrote {path}", soft_wrap=True)
    return 0


REPORT = Command("report", "Turn result files of `attnzoo bench` or `attnzoo train` into figures and one HTML page.", add_arguments, run)

#: Name of the files, kind of the rows, the table a row stands in, the page and the figures.
Report = tuple[str, Any, Callable[[Any], Hashable], Callable[[Sequence[Any]], str], Callable[[Sequence[Any]], "list[Drawing]"]]


def _check_machines(lots: Mapping[str, Sequence[Any]], table_of: Callable[[Any], Hashable]) -> None:
    """Raise ValueError when one table would hold times of two machines. lots: the rows by file."""
    from attnzoo.bench.rows import check_one_machine

    seen: dict[Hashable, tuple[str, list[Any]]] = {}
    for path, rows in lots.items():
        tables: dict[Hashable, list[Any]] = {}
        for row in rows:
            tables.setdefault(table_of(row), []).append(row.environment)
        for table, environments in tables.items():
            first, others = seen.setdefault(table, (path, environments))
            check_one_machine(others, environments, first, path)


def _benchmark() -> Report:
    from attnzoo.bench.rows import Row
    from attnzoo.report.bench_figures import drawings
    from attnzoo.report.bench_page import page

    return "bench", Row, lambda row: None, page, drawings


def _training() -> Report:
    from attnzoo.report.train_figures import drawings
    from attnzoo.report.train_page import page
    from attnzoo.tasks.rows import Row
    from attnzoo.tasks.summary import summed_up

    return "train", Row, lambda row: row.group, page, lambda rows: drawings(summed_up(rows))


def _starts_with(path: str, start: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return file.read(len(start)) == start.encode()
    except OSError:
        return False  # whoever reads the rows says why
