"""attnzoo report FILES: result files of `attnzoo bench` as figures and one HTML page."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, screen
from attnzoo.commands.output import check_folder, write_text


def add_arguments(parser: ArgumentParser) -> None:
    """The result files, and where the page goes."""
    parser.add_argument("files", nargs="+", type=str, metavar="FILE", help="result files of `attnzoo bench`, of one machine")
    parser.add_argument("--output", type=str, default="report", metavar="FOLDER", help="gets bench.html and the figures")


def run(settings: Namespace) -> int:
    """Read all files, then write the figures and the page."""
    from attnzoo.bench.rows import check_one_machine, read_rows
    from attnzoo.report.bench_figures import drawings
    from attnzoo.report.bench_page import page
    from attnzoo.report.export import write_figures

    lots = {path: read_rows(path) for path in settings.files}
    for path, rows in lots.items():
        if not rows:
            raise ValueError(f"{path} holds no rows; give a file that `attnzoo bench` wrote")
        first = settings.files[0]
        check_one_machine([row.environment for row in lots[first]], [row.environment for row in rows], first, path)
    rows = list({row.key: row for rows in lots.values() for row in rows}.values())
    folder = check_folder(settings.output)
    for path in [write_text(folder / "bench.html", page(rows)), *write_figures(drawings(rows), folder, "bench-")]:
        screen().print(f"wrote {path}", soft_wrap=True)
    return 0


REPORT = Command("report", "Turn result files of `attnzoo bench` into figures and one HTML page.", add_arguments, run)
