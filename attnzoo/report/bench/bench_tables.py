"""The numbers of a benchmark as tables: one a setting and one of crossovers, for the screen and the
page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnzoo.benchmarking.bench_rows import SDPA, Row
from attnzoo.benchmarking.crossover import NOTE, Crossover, curves, memory_crossover, time_crossover
from attnzoo.registry import names, spec_of
from attnzoo.report.bench.bench_figures import panel_title, panels
from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, duration, memory, percent, ratio

FORMULA = (
    "measured speed-up = t of SDPA / t; MAC speed-up = MACs of SDPA / MACs; limit = least time by "
    "measured GEMM rate and copy bandwidth / t, "
    "above 100% where data stays in a cache, or the machine runs faster than when its limit was "
    "measured; shapes are batch × heads × head_dim"
)
COLUMNS = (
    Column("contender", "attention", words=True),
    Column("length", "n"),
    Column("seconds", "median", duration),
    Column("quartiles", "quartiles", words=True),
    Column("rounds", "rounds"),
    Column("graph_seconds", "CUDA graph", duration),
    Column("tokens_per_second", "tokens/s", lambda value: count(int(value))),
    Column("gflops", "GFLOP/s", ",.1f"),
    Column("gigabytes", "GB/s", ",.1f"),
    Column("speedup", "measured speed-up", ratio),
    Column("kept", "measured / MAC", ".2f"),
    Column("limit", "limit", percent),
    Column("peak_bytes", "peak", memory),
    Column("ran", "ran", words=True),
)
GPU_ONLY = ("graph_seconds",)
#: What tells the settings of rows apart.
SETTINGS = (
    Column("level", "level", words=True),
    Column("phase", "phase", words=True),
    Column("is_causal", "causal", lambda value: "yes" if value else "no", words=True),
    Column("dtype", "dtype", words=True),
    Column("batch_size", "batch"),
    Column("heads", "heads"),
    Column("head_dim", "head_dim"),
    Column("segments", "pieces"),
)


def whole_table(rows: Sequence[Row]) -> Table:
    """All rows in one table, with those of their settings that differ; what got no time is a note
    with its reason."""
    told = [
        column
        for column in SETTINGS
        if len({getattr(row, column.key) for row in rows if row.seconds is not None}) > 1
    ]
    same = next(iter(panels(rows)), "") if not told else ""
    return _table("bench", _on_one_line(same) or "Every setting", rows, told)


def setting_tables(rows: Iterable[Row]) -> list[Table]:
    """A table a setting, its lengths rising; what got no time is a note with its reason."""
    return [
        _table(f"setting-{number}", _on_one_line(title), found)
        for number, (title, found) in enumerate(panels(rows).items(), 1)
    ]


def _on_one_line(title: str) -> str:
    return title.replace("\n", "; ")


def _table(name: str, title: str, rows: Sequence[Row], told: Sequence[Column] = ()) -> Table:
    timed = sorted((row for row in rows if row.seconds is not None), key=lambda row: row.length)
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        if row.seconds is None:
            reasons.setdefault((row.contender, row.reason), []).append(row.length)
    notes = [
        f"{contender}, n = {', '.join(f'{n:,}' for n in dict.fromkeys(lengths))}: {reason}"
        for (contender, reason), lengths in reasons.items()
    ]
    first, *others = (
        column
        for column in COLUMNS
        if column.key not in GPU_ONLY or any(row.graph_seconds for row in timed)
    )
    return Table(
        name,
        title,
        FORMULA,
        (first, *told, *others),
        tuple(
            {**{column.key: getattr(row, column.key) for column in told}, **_numbers(row)}
            for row in timed
        ),
        notes=tuple(notes),
    )


def _numbers(row: Row) -> dict[str, object]:
    flops, moved = row.flops_per_second, row.bytes_per_second
    quartiles = (
        None if row.seconds_quartiles is None else " to ".join(map(duration, row.seconds_quartiles))
    )
    return {
        "contender": "SDPA (direct)" if row.variant == SDPA else row.contender,
        "length": row.length,
        "seconds": row.seconds,
        "quartiles": quartiles,
        "rounds": row.rounds,
        "graph_seconds": row.graph_seconds,
        "tokens_per_second": row.tokens_per_second,
        "gflops": None if flops is None else flops / 1e9,
        "gigabytes": None if moved is None else moved / 1e9,
        "speedup": row.speedup,
        "kept": row.kept_speedup,
        "limit": row.limit_share,
        "peak_bytes": row.peak_bytes,
        "ran": row.ran,
    }


def crossover_table(rows: Iterable[Row]) -> Table:
    """Where every contender but exact attention itself starts to win over SDPA, in time and in
    memory."""
    found = []
    exact = {SDPA, *(name for name in names() if spec_of(name).family == "exact")}
    for curve in curves(rows).values():
        if curve[0].variant not in exact and time_crossover(curve) is not None:
            setting = _on_one_line(panel_title(curve[0]))
            texts = {"time": _text(time_crossover(curve)), "memory": _text(memory_crossover(curve))}
            found.append({"contender": curve[0].contender, "setting": setting, **texts})
    columns = (
        Column("contender", "attention", words=True),
        Column("setting", "setting", words=True),
        Column("time", "n, time"),
        Column("memory", "n, memory"),
    )
    return Table(
        "crossovers",
        "Crossover lengths against exact SDPA",
        "n in tokens",
        columns,
        tuple(found),
        notes=(NOTE,),
    )


def _text(found: Crossover | None) -> str | None:
    return None if found is None else found.text()
