"""attnzoo bench: time and memory of attentions beside exact SDPA, row by row into a result file."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from attnzoo.arguments import nearest
from attnzoo.commands import DEVICE_LOST, GOT_SLOWER, INTERRUPTED
from attnzoo.commands.command import Command, messages, screen
from attnzoo.commands.output import check_folder, open_results, progress_on
from attnzoo.commands.variants import parse_variant

if TYPE_CHECKING:
    from attnzoo.bench.bench_rows import Row
    from attnzoo.results.result_file import ResultFile

PAGE_ONLY = ("quartiles", "rounds")  # columns that a terminal has no room for


def add_arguments(parser: ArgumentParser) -> None:
    """What to measure, where the rows go, and what to compare them with."""
    parser.add_argument(
        "--config",
        type=str,
        default="quick",
        metavar="FILE",
        help="a YAML file of sweeps, or quick, cpu, gates or cuda of the shipped configs/bench",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="report/bench.jsonl",
        metavar="FILE",
        help="gets each row as soon as it is measured; what it holds is skipped",
    )
    parser.add_argument(
        "--against",
        type=str,
        metavar="FILE",
        help="an older result file: print what got slower beyond the noise and exit with 1",
    )


def run(settings: Namespace) -> int:
    """Check everything, measure what is missing, print, and compare."""
    from attnzoo.bench.bench_rows import check_one_machine, read_rows
    from attnzoo.bench.cuda_timing import DeviceLost
    from attnzoo.bench.environment import environment
    from attnzoo.bench.heap import bounded_memory
    from attnzoo.bench.plan import read_plan
    from attnzoo.bench.regressions import check_common
    from attnzoo.bench.sweep import planned, run_plan
    from attnzoo.fidelity import check_device

    started, console = time.monotonic(), messages()
    plan = read_plan(config_path(settings.config))
    device = check_device(plan.device)
    for sweep in plan.sweeps:
        sweep.contenders(parse_variant)  # whatever is wrong with one is said before any work
    if (
        settings.against is not None
        and Path(settings.against).resolve() == Path(settings.output).resolve()
    ):
        raise ValueError(
            f"against={settings.against!r} is the file that gets the rows, and says nothing about "
            "itself; give another with --output"
        )
    old = None if settings.against is None else read_rows(settings.against)
    results = _open(settings.output)
    held = results.rows()
    facts = environment(seed=plan.seed, device=device)
    check_one_machine([facts], [row.environment for row in held], "this run", str(results.path))
    if old is not None:
        check_one_machine(
            [facts], [row.environment for row in old], "this run", str(settings.against)
        )
        keys = planned(plan, parse_variant) | {row.key for row in held}
        check_common(old, keys, what=f"config {settings.config}", against=str(settings.against))
    if held:
        commits = sorted(
            {(row.environment or {}).get("commit", "") for row in held}
            - {facts.get("commit", ""), ""}
        )
        console.print(
            f"attnzoo: {results.path} holds {len(held)} rows, which are kept"
            + (f", from commit {', '.join(commits)}" if commits else "")
        )
        late = sum(row.is_late for row in held)
        if late:
            console.print(f"attnzoo: {late} of them were over the time budget and are tried again")
    if device.type == "cpu" and "OMP_PROC_BIND" not in os.environ:
        console.print(
            "attnzoo: for steadier times set OMP_PROC_BIND=true before the run", soft_wrap=True
        )
    try:
        finished = {row.key for row in held if not row.is_late}
        with bounded_memory(device), progress_on(console) as progress:
            for row in run_plan(plan, parse_variant, device, finished, progress):
                results.append(row)
    except (KeyboardInterrupt, DeviceLost) as error:
        said, code = (
            ("interrupted", INTERRUPTED)
            if isinstance(error, KeyboardInterrupt)
            else (f"the device was lost ({error})", DEVICE_LOST)
        )
        # Of the file: an interrupt may come between a row and its count.
        fresh = len(results.rows()) - len(held)
        console.print(
            f"attnzoo: {said}; {fresh} new rows are in {results.path}, and the same command goes "
            "on from there",
            soft_wrap=True,
        )
        return code
    rows = results.rows()
    fresh = len(rows) - len(held)
    _print(rows)
    screen().print(
        f"wrote {fresh} rows to {results.path}; figures: attnzoo report {results.path}",
        soft_wrap=True,
    )
    console.print(f"finished in {time.monotonic() - started:.0f} s")
    return 0 if old is None else _compare(old, rows, str(settings.against), str(results.path))


BENCH = Command(
    "bench",
    "Measure time and memory of attentions beside exact SDPA, from a YAML file of sweeps.",
    add_arguments,
    run,
)


def config_path(text: str) -> Path:
    """A file, or one of the shipped configurations by its name. Raises ValueError when it is
    neither."""
    from attnzoo.configuration import configs_folder

    folder = configs_folder() / "bench"
    if Path(text).exists() or Path(text).suffix:
        return Path(text)
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    if text not in shipped:
        raise ValueError(
            f"config {text!r} is no file{nearest(text, shipped)}; give a YAML file of sweeps, or "
            f"one of {', '.join(shipped)}"
        )
    return folder / f"{text}.yaml"


def _open(path: str) -> ResultFile[Row]:
    from attnzoo.bench.bench_rows import Row

    if Path(path).is_dir():
        raise ValueError(
            f"output={path!r} is a folder; give a file such as {path}/bench.jsonl with --output"
        )
    check_folder(Path(path).parent)
    return open_results(Path(path), Row)


def _print(rows: list[Row]) -> None:
    from attnzoo.report.bench.bench_tables import crossover_table, setting_tables
    from attnzoo.report.tables import rich_table

    for table in (*setting_tables(rows), crossover_table(rows)):
        screen().print(table.title, style="bold")
        screen().print(
            rich_table(
                replace(
                    table,
                    columns=tuple(
                        column for column in table.columns if column.key not in PAGE_ONLY
                    ),
                )
            )
        )
        for note in table.notes:
            screen().print(note, style="dim")
        screen().print()


def _compare(old: list[Row], new: list[Row], against: str, output: str) -> int:
    from attnzoo.bench.regressions import RULE, compare_runs, sdpa_growth

    slowdowns, compared = compare_runs(old, new, what=output, against=against)
    screen().print(
        f"{len(slowdowns)} of {compared} rows got slower than in {against} ({RULE})", soft_wrap=True
    )
    growth = sdpa_growth(old, new)
    if growth is not None:
        screen().print(
            f"SDPA, called directly, takes {growth:.2f} times as long as then, a median over its "
            "settings",
            soft_wrap=True,
        )
    for slowdown in slowdowns:
        screen().print(f"- {slowdown.sentence()}", soft_wrap=True)
    return GOT_SLOWER if slowdowns else 0
