"""attnzoo report FILES: result files of `attnzoo bench`, `attnzoo train` or `attnzoo compare
--model` as figures and HTML pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, screen

if TYPE_CHECKING:
    from attnzoo.report.result import Result


@dataclass(frozen=True)
class Report:
    """How rows of one kind are drawn.

    results: what is drawn, each with a page of its own.
    table_of: the table that a row stands in, which holds times of one machine; None: no times are
    in it.
    """

    kind: Any
    results: Callable[[Sequence[Any]], list[Result]]
    table_of: Callable[[Any], Hashable] | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The result files, and where the pages go."""
    parser.add_argument(
        "files",
        nargs="+",
        type=str,
        metavar="FILE",
        help="result files, all of `attnzoo bench`, of `attnzoo train` or of `attnzoo compare "
        "--model`; the rows of one table are of one machine",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="report",
        metavar="FOLDER",
        help="gets bench.html, train.html or quality-MODEL.html, and the figures",
    )


def run(settings: Namespace) -> int:
    """Read all files, then write the figures and the pages."""
    from attnzoo.results.result_file import read_rows

    report = _report_of(settings.files)
    lots = {path: read_rows(path, report.kind) for path in settings.files}
    for path, rows in lots.items():
        if not rows:
            raise ValueError(
                f"{path} holds no rows; give a file that `{report.kind.COMMAND}` wrote"
            )
    if report.table_of is not None:
        _check_machines(lots, report.table_of)
    rows = list({row.key: row for rows in lots.values() for row in rows}.values())
    for result in report.results(rows):
        for path in result.save(settings.output):
            screen().print(f"wrote {path}", soft_wrap=True)
    return 0


REPORT = Command(
    "report",
    "Turn result files of bench, train or compare --model into figures and HTML pages.",
    add_arguments,
    run,
)


def _report_of(paths: Sequence[str]) -> Report:
    """What draws the files. Raises ValueError on a file without rows, on rows that nothing here
    draws, and on files of two kinds."""
    by_format = {report.kind.FORMAT: report for report in (_benchmark(), _training(), _quality())}
    found = {path: _format_of(path) for path in paths}
    commands = ", ".join(f"`{report.kind.COMMAND}`" for report in by_format.values())
    for path, form in found.items():
        if form not in by_format:
            what = (
                "its rows name no format of attnzoo's"
                if form is None
                else f"its rows are of the format {form!r}"
            )
            raise ValueError(
                f"{path} cannot be drawn: {what}; give result files of one of {commands} (a study "
                "of benchmarks/ draws its own: docs/results/index.md)"
            )
    kinds = {form: path for path, form in found.items()}
    if len(kinds) > 1:
        said = " and ".join(
            f"{path} holds results of `{by_format[form].kind.COMMAND}`"
            for form, path in kinds.items()
            if form is not None
        )
        raise ValueError(f"{said}; draw one kind at a time")
    return by_format[next(form for form in kinds if form is not None)]


def _format_of(path: str) -> str | None:
    """What the first line says its format is; None when it is no result. Raises ValueError on a
    file that cannot be read or is empty."""
    try:
        # The last line may be cut inside a letter, which must not cost the first.
        with Path(path).open("rb") as file:
            line = next((line.decode() for line in file if line.strip()), None)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}; give a "
            "result file"
        ) from None
    if line is None:
        raise ValueError(
            f"{path} holds no rows; give a result file that a command of attnzoo wrote"
        )
    try:
        found = json.loads(line)
    except ValueError:
        return None
    form = found.get("format") if isinstance(found, dict) else None
    return form if isinstance(form, str) else None


def _check_machines(lots: Mapping[str, Sequence[Any]], table_of: Callable[[Any], Hashable]) -> None:
    """Raise ValueError when one table would hold times of two machines.

    lots: the rows by file.
    """
    from attnzoo.benchmarking.bench_rows import check_one_machine

    seen: dict[Hashable, tuple[str, list[Any]]] = {}
    for path, rows in lots.items():
        tables: dict[Hashable, list[Any]] = {}
        for row in rows:
            tables.setdefault(table_of(row), []).append(row.environment)
        for table, environments in tables.items():
            first, others = seen.setdefault(table, (path, environments))
            check_one_machine(others, environments, first, path)


def _benchmark() -> Report:
    from attnzoo.benchmarking.bench_rows import Row
    from attnzoo.report.bench.bench_page import bench_result

    return Report(Row, lambda rows: [bench_result(rows)], lambda row: None)


def _training() -> Report:
    from attnzoo.report.training.train_page import training_result
    from attnzoo.training.training_rows import Row

    return Report(Row, lambda rows: [training_result(rows)], lambda row: row.group)


def _quality() -> Report:
    from attnzoo.quality.quality_rows import Row, by_page
    from attnzoo.report.quality.quality_page import quality_result

    return Report(Row, lambda rows: [quality_result(own) for own in by_page(rows).values()])
