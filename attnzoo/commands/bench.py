"""attnzoo bench: time and memory of attentions beside exact SDPA, row by row into a result file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands import DEVICE_LOST, GOT_SLOWER, INTERRUPTED
from attnzoo.commands.command import Command, add_variants, screen, variants_of

if TYPE_CHECKING:
    from attnzoo.benchmarking.bench_rows import Row
    from attnzoo.public.run_bench import Bench

PAGE_ONLY = ("quartiles", "rounds")  # columns that a terminal has no room for


#: Flags that are settings of a sweep by the same name.
SETTINGS = (
    "lengths",
    "dtype",
    "batch_size",
    "heads",
    "head_dim",
    "levels",
    "phases",
    "backends",
    "segments",
    "rounds",
    "budget",
    "device",
    "seed",
)


def add_arguments(parser: ArgumentParser) -> None:
    """What to measure, where the rows go, and what to compare them with."""
    add_variants(parser, "those of the configuration, or the whole zoo")
    parser.add_argument(
        "--config",
        type=str,
        metavar="FILE",
        help="a YAML file of sweeps, or quick, cpu, gates or cuda of the shipped configs/bench; "
        "the settings below stand in the place of its own (default: quick where no setting is "
        "given, else one sweep of the settings)",
    )
    sizes: dict[str, Any] = {"nargs": "+", "type": int}
    words: dict[str, Any] = {"nargs": "+", "type": str}
    parser.add_argument(
        "--lengths", **sizes, metavar="TOKENS", help="of a sequence (default: 1024)"
    )
    parser.add_argument(
        "--dtype",
        **words,
        help="float32 (default), float64, bfloat16 or float16, or several of them",
    )
    parser.add_argument("--batch-size", **sizes, metavar="N", help="samples (default: 1)")
    parser.add_argument("--heads", **sizes, metavar="N", help="heads (default: 8)")
    parser.add_argument("--head-dim", **sizes, metavar="N", help="width of a head (default: 64)")
    parser.add_argument(
        "--levels",
        **words,
        metavar="LEVEL",
        help="core (default), multihead (with projections) or layer (a whole layer)",
    )
    parser.add_argument(
        "--phases",
        **words,
        metavar="PHASE",
        help="forward (default), forward+backward or decode",
    )
    parser.add_argument(
        "--causal",
        nargs="*",
        type=str,
        metavar="true|false",
        help="without a value true; true false measures both (default: false)",
    )
    parser.add_argument(
        "--backends", **words, metavar="NAME", help="as `attnzoo show` names them (default: auto)"
    )
    parser.add_argument(
        "--segments",
        **sizes,
        metavar="N",
        help="equal pieces that are packed into a row (default: 1)",
    )
    parser.add_argument("--rounds", type=int, help="how often each attention is timed (default: 7)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for timing one setting (default: 10)"
    )
    parser.add_argument("--device", type=str, help="cpu (default), cuda or cuda:INDEX")
    parser.add_argument("--seed", type=int, help="of all random numbers (default: 0)")
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
    from attnzoo.public.run_bench import INTERRUPTED as CTRL_C
    from attnzoo.public.run_bench import measure, prepare
    from attnzoo.results.progress import say

    started = time.monotonic()
    given = {name: settings[name] for name in SETTINGS if settings[name] is not None}
    if variants_of(settings) is not None:
        given["variants"] = variants_of(settings)
    if settings.causal is not None:
        given["causal"] = [_truth(text) for text in settings.causal] or [True]
    config = settings.config or (None if given else "quick")
    prepared = prepare(given, config, settings.output)
    against = None if settings.against is None else str(settings.against)
    old = None if against is None else _read_old(prepared, against, settings.output, config)
    _say_held(prepared)
    result = measure(prepared)
    assert prepared.file is not None  # --output has a default
    path, rows = prepared.file.path, prepared.file.rows()
    # Of the file: an interrupt may come between a row and its count.
    fresh = len(rows) - len(prepared.held)
    if result.interrupted:
        say(
            f"attnzoo: {result.interrupted}; {fresh} new rows are in {path}, and the same command "
            "goes on from there"
        )
        return INTERRUPTED if result.interrupted == CTRL_C else DEVICE_LOST
    _print(result.rows)
    screen().print(f"wrote {fresh} rows to {path}; figures: attnzoo report {path}", soft_wrap=True)
    say(f"finished in {time.monotonic() - started:.0f} s")
    return 0 if old is None or against is None else _compare(old, rows, against, str(path))


BENCH = Command(
    "bench",
    "Measure time and memory of attentions beside exact SDPA: in sizes of your own, or from a YAML "
    "file of sweeps.",
    add_arguments,
    run,
)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"causal: {text!r} must be true or false")
    return text == "true"


def _read_old(prepared: Bench, against: str, output: str, config: str | None) -> list[Row]:
    """The rows to compare with. Raises ValueError when they say nothing about this run."""
    from attnzoo.benchmarking.bench_rows import check_one_machine, read_rows
    from attnzoo.benchmarking.regressions import check_common
    from attnzoo.benchmarking.sweep import planned
    from attnzoo.public.variant_text import parse_variant

    if Path(against).resolve() == Path(output).resolve():
        raise ValueError(
            f"against={against!r} is the file that gets the rows, and says nothing about itself; "
            "give another with --output"
        )
    old = read_rows(against)
    check_one_machine([prepared.facts], [row.environment for row in old], "this run", against)
    keys = planned(prepared.plan, parse_variant) | {row.key for row in prepared.held}
    what = "what was asked for" if config is None else f"config {config}"
    check_common(old, keys, what=what, against=against)
    return old


def _say_held(prepared: Bench) -> None:
    """Say which rows are there already, and how times get steadier."""
    from attnzoo.results.progress import say

    held = prepared.held
    if held and prepared.file is not None:
        now = prepared.facts.get("commit", "")
        commits = sorted({(row.environment or {}).get("commit", "") for row in held} - {now, ""})
        say(
            f"attnzoo: {prepared.file.path} holds {len(held)} rows, which are kept"
            + (f", from commit {', '.join(commits)}" if commits else "")
        )
        late = sum(row.is_late for row in held)
        if late:
            say(f"attnzoo: {late} of them were over the time budget and are tried again")
    if prepared.device.type == "cpu" and "OMP_PROC_BIND" not in os.environ:
        say("attnzoo: for steadier times set OMP_PROC_BIND=true before the run")


def _print(rows: Sequence[Row]) -> None:
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
    from attnzoo.benchmarking.regressions import RULE, compare_runs, sdpa_growth

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
