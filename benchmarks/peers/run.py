"""Our variants and other libraries' implementations of the same mathematics, in one process and in
interleaved rounds, on the CPU.

    python benchmarks/peers/run.py

float32, batch 1, 8 heads, head_dim 64. Every row is written as soon as it is measured; what the
file holds is not measured again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Before torch is imported: unbound, two threads may come to share one core.
os.environ.setdefault("OMP_PROC_BIND", "true")
# No pool of compilers beside what is timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The profiler warns of memory that was there before it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if TYPE_CHECKING:
    from peer_rows import PeerRow

    from attnzoo.benchmarking.bench_rows import ResultFile

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PHASES = ("forward", "forward+backward")
LENGTH_UNIT = 1024  # what some peers need lengths to be a multiple of
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Its complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from peer_settings import OURS

    parser = Parser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=list(OURS),
        choices=list(OURS),
        metavar="GROUP",
        help=f"of {', '.join(OURS)} (default: all)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=list(LENGTHS),
        metavar="N",
        help="tokens, multiples of 1024 (default: 1024 to 16384)",
    )
    parser.add_argument(
        "--phases",
        nargs="+",
        default=list(PHASES),
        choices=PHASES,
        metavar="PASS",
        help="forward, forward+backward (default: both)",
    )
    parser.add_argument(
        "--form", choices=("causal", "bidirectional", "both"), default="both", help="default: both"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="rounds of each setting, if the budget allows; never fewer than 3 (default: 5)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=9.0,
        metavar="SECONDS",
        help="after which a setting gets no new round, once there are 3; a peer whose pass takes "
        "longer than a third of it gets no time, only "
        "the reason; ours and SDPA always get one (default: 9)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report/peers.jsonl"),
        metavar="FILE",
        help="result file (default: report/peers.jsonl)",
    )
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the tables of --output"
    )
    parser.add_argument(
        "--full", action="store_true", help="print every contender of every setting too"
    )
    settings = parser.parse_args(arguments)
    for length in settings.lengths:
        if length < 1 or length % LENGTH_UNIT:
            raise ValueError(
                f"--lengths {length} must be a multiple of {LENGTH_UNIT}: some peers take nothing "
                "else"
            )
    if settings.rounds < 3:
        raise ValueError(
            f"--rounds {settings.rounds} must be at least 3: a median of fewer says nothing"
        )
    if not 0 < settings.budget < float("inf"):
        raise ValueError(f"--budget {settings.budget:g} must be a number of seconds above 0")
    return settings


def run(settings: argparse.Namespace) -> int:
    """Measure what is missing, and print the tables."""
    from peer_rows import PeerRow

    from attnzoo.benchmarking.bench_rows import ResultFile

    results = ResultFile(settings.output, PeerRow)
    if settings.table and not settings.output.exists():
        raise ValueError(f"{settings.output} does not exist; run without --table first")
    rows = results.rows()
    if not settings.table:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        if (said := results.repair()) is not None:
            print(said, file=sys.stderr)
        if rows:
            print(f"{settings.output} holds {len(rows)} rows, which are kept", file=sys.stderr)
        started = time.monotonic()
        try:
            measure(settings, results, rows)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from there", file=sys.stderr)
            return INTERRUPTED
        print(f"finished in {time.monotonic() - started:.0f} s", file=sys.stderr)
    show(results.rows(), settings.full)
    return 0


def measure(
    settings: argparse.Namespace, results: ResultFile[PeerRow], held: Sequence[PeerRow]
) -> None:
    """Append the rows that `held` does not have, setting by setting."""
    import torch
    from peer_bench import PeerBench, entrants

    from attnzoo.benchmarking.bench_rows import check_one_machine
    from attnzoo.benchmarking.heap import bounded_memory
    from attnzoo.benchmarking.plan import Cell, Shape

    bench = PeerBench(torch.device("cpu"), seed=0)
    check_one_machine(
        [bench.facts], [row.environment for row in held], "this run", str(results.path)
    )
    done = {row.key for row in held if not row.is_late}
    forms = {"causal": (True,), "bidirectional": (False,), "both": (False, True)}[settings.form]
    cells = [
        Cell("core", phase, is_causal, length, "float32", Shape())
        for length in sorted(settings.lengths)
        for phase in settings.phases
        for is_causal in forms
    ]
    with bounded_memory(torch.device("cpu")):
        for number, cell in enumerate(cells, 1):
            # Graphs of another length serve no one, and count against a limit
            torch.compiler.reset()
            all_entrants = entrants(settings.groups, cell.is_causal)
            missing = {
                entrant.group
                for entrant in all_entrants
                if bench.blank(entrant, cell).key not in done
            }
            if not missing and bench.blank(None, cell).key in done:
                continue
            started = time.monotonic()
            # A whole group is measured again for the sake of one missing row, so that its ratios
            # are of the same rounds.
            for row in bench.measure(
                cell,
                [entrant for entrant in all_entrants if entrant.group in missing],
                settings.rounds,
                settings.budget,
            ):
                results.append(row)
            print(
                f"[{number}/{len(cells)}] {cell.title()}: {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def show(rows: Sequence[PeerRow], full: bool) -> None:
    from peer_table import full_tables, tables

    from attnzoo.commands.command import screen
    from attnzoo.report.tables import rich_table

    for table in [*(full_tables(rows) if full else []), *tables(rows)]:
        screen().print(table.title, style="bold", soft_wrap=True)
        screen().print(rich_table(table))
        for note in table.notes:
            screen().print(f"- {note}", style="dim", soft_wrap=True)
        screen().print()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except ImportError as error:
        print(f"run.py: {error}; benchmarks/peers/README.md says how to set up", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
