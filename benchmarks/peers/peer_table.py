"""What a comparison says: a table a group, ours beside the best peer; all peers of each setting;
and what was wrong or left out."""

from __future__ import annotations

from collections.abc import Iterable

from peer_rows import PeerRow
from peer_settings import OURS

from attnzoo.benchmarking.bench_rows import SDPA
from attnzoo.results.table import Column, Table
from attnzoo.results.units import duration, ratio

SUMMARY = (
    Column("form", "form", words=True),
    Column("phase", "pass", words=True),
    Column("length", "n"),
    Column("ours", "ours", duration),
    Column("sdpa", "SDPA", duration),
    Column("best", "best peer", words=True),
    Column("best_seconds", "its time", duration),
    Column("times", "peer / ours", ratio),
    Column("kept", "measured / MAC", ".2f"),
    Column("best_kept", "its measured / MAC", ".2f"),
    Column("rounds", "rounds"),
)
FORMULA = (
    "medians of interleaved rounds; measured / MAC = (t of SDPA / t) / (MACs of SDPA / our MACs), "
    "all times of one line from the same rounds"
)
WRONG_MARK = " !"  # behind the name of a peer whose results are wrong


def tables(rows: Iterable[PeerRow]) -> list[Table]:
    """A table a group that has rows."""
    by_group: dict[str, list[PeerRow]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    return [_table(group, by_group[group]) for group in OURS if group in by_group]


def _table(group: str, rows: list[PeerRow]) -> Table:
    settings: dict[tuple[bool, str, int], list[PeerRow]] = {}
    for row in sorted(rows, key=lambda row: (row.is_causal, row.phase, row.length)):
        settings.setdefault((row.is_causal, row.phase, row.length), []).append(row)
    lines = tuple(_line(found) for found in settings.values())
    return Table(
        group, f"{group}: {_contenders(rows)}", FORMULA, SUMMARY, lines, notes=tuple(_notes(rows))
    )


def _contenders(rows: list[PeerRow]) -> str:
    ours = next((row.label for row in rows if row.is_ours), "not in the zoo")
    return (
        f"attnzoo's {ours} and "
        f"{', '.join(dict.fromkeys(row.label for row in rows if _is_peer(row))) or 'no peer'}"
    )


def _line(rows: list[PeerRow]) -> dict[str, object]:
    first = rows[0]
    ours = next((row for row in rows if row.is_ours and row.seconds), None)
    best = min(
        (row for row in rows if _is_peer(row) and row.seconds),
        key=lambda row: row.times_ours or row.seconds or 0.0,
        default=None,
    )
    any_timed = ours or best
    return {
        "form": "causal" if first.is_causal else "not causal",
        "phase": first.phase,
        "length": first.length,
        "ours": None if ours is None else ours.seconds,
        "sdpa": None if any_timed is None else any_timed.sdpa_seconds,
        "best": None if best is None else best.label + (WRONG_MARK if best.fault else ""),
        "best_seconds": None if best is None else best.seconds,
        "times": None if best is None else best.times_ours,
        "kept": None if ours is None else ours.kept_speedup,
        "best_kept": None if best is None else best.kept_speedup,
        "rounds": None if any_timed is None else any_timed.rounds,
    }


def _is_peer(row: PeerRow) -> bool:
    return not row.is_ours and row.variant != SDPA


def _notes(rows: list[PeerRow]) -> list[str]:
    """Faults and reasons, each with the lengths it was found at; the fault's numbers are those of
    the longest."""
    said: dict[tuple[str, bool, str], dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        if row.fault:
            said.setdefault((row.label, row.is_causal, "! "), {})[row.length] = row.fault
        if row.reason:
            said.setdefault((row.label, row.is_causal, f"no time at {row.phase}: "), {})[
                row.length
            ] = row.reason
    return [
        f"{label}, {'causal' if is_causal else 'not causal'}, n = "
        f"{', '.join(f'{n:,}' for n in found)}: {kind.strip('! ')}"
        f"{' ' if kind != '! ' else ''}{found[max(found)]}"
        for (label, is_causal, kind), found in said.items()
    ]


PEER_COLUMNS = (
    Column("label", "contender", words=True),
    Column("length", "n"),
    Column("seconds", "median", duration),
    Column("quartiles", "quartiles", words=True),
    Column("times", "/ ours", ratio),
    Column("kept", "measured / MAC", ".2f"),
    Column("error", "error", ".1g"),
)


def full_tables(rows: Iterable[PeerRow]) -> list[Table]:
    """Every contender of every setting: a table for each group, form and pass."""
    parts: dict[tuple[str, bool, str], list[PeerRow]] = {}
    for row in rows:
        if row.seconds is not None:
            parts.setdefault((row.group, row.is_causal, row.phase), []).append(row)
    return [
        Table(
            f"{group}-{number}",
            f"{group}, {'causal' if is_causal else 'not causal'}, {phase}",
            FORMULA,
            PEER_COLUMNS,
            tuple(
                _numbers(row)
                for row in sorted(found, key=lambda row: (row.length, row.seconds or 0.0))
            ),
        )
        for number, ((group, is_causal, phase), found) in enumerate(
            sorted(parts.items(), key=lambda part: (list(OURS).index(part[0][0]), part[0]))
        )
    ]


def _numbers(row: PeerRow) -> dict[str, object]:
    return {
        "label": row.label + (" (ours)" if row.is_ours else ""),
        "length": row.length,
        "seconds": row.seconds,
        "quartiles": None
        if row.seconds_quartiles is None
        else " to ".join(map(duration, row.seconds_quartiles)),
        "times": row.times_ours,
        "kept": row.kept_speedup,
        "error": row.error,
    }
