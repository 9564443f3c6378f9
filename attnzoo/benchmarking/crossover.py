"""From which length on a contender beats SDPA, in time and in memory, between the lengths that were
measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from attnzoo.benchmarking.bench_rows import SDPA, Row

NOTE = (
    "Crossover: the length from which on a contender needs less than exact SDPA at every longer "
    "length measured, interpolated between two "
    "measured lengths on logarithmic scales; ≤ and > name the shortest and longest length measured."
)


@dataclass(frozen=True)
class Crossover:
    """From which length on a contender wins.

    length: tokens, interpolated; None outside the measured lengths.
    shortest, longest: the measured lengths.
    wins: where length is None, whether it wins at all of them.
    """

    length: float | None
    wins: bool
    shortest: int
    longest: int

    def text(self) -> str:
        """Such as "1,340", "≤ 256" (wins wherever measured) or "> 4,096" (does not win at the
        longest)."""
        if self.length is not None:
            return f"{self.length:,.0f}"
        return f"≤ {self.shortest:,}" if self.wins else f"> {self.longest:,}"


def crossover(points: Sequence[tuple[int, float]]) -> Crossover | None:
    """The length from which on a ratio of SDPA's need to the contender's stays above 1.

    points: (length, ratio) each.
    Returns None when there are no points.
    """
    ordered = sorted(points)
    if not ordered:
        return None
    shortest, longest = ordered[0][0], ordered[-1][0]
    losing = [index for index, (_, ratio) in enumerate(ordered) if ratio <= 1]
    if not losing or losing[-1] == len(ordered) - 1:
        return Crossover(None, not losing, shortest, longest)
    (low, below), (high, above) = ordered[losing[-1] : losing[-1] + 2]
    part = -math.log(below) / (math.log(above) - math.log(below))
    return Crossover(
        math.exp(math.log(low) + part * (math.log(high) - math.log(low))), True, shortest, longest
    )


def curves(rows: Iterable[Row]) -> dict[tuple[object, ...], list[Row]]:
    """Rows by setting and contender, short lengths first."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        found.setdefault((*row.setting, row.contender), []).append(row)
    return found


def time_crossover(curve: Iterable[Row]) -> Crossover | None:
    """In time, of one contender in one setting."""
    return _of(curve, lambda row: row.speedup)


def memory_crossover(curve: Iterable[Row]) -> Crossover | None:
    """In peak memory, of one contender in one setting."""
    return _of(
        curve,
        lambda row: (
            row.sdpa_peak_bytes / row.peak_bytes if row.sdpa_peak_bytes and row.peak_bytes else None
        ),
    )


def _of(curve: Iterable[Row], ratio: Callable[[Row], float | None]) -> Crossover | None:
    points = [(row.length, ratio(row)) for row in curve if row.variant != SDPA]
    return crossover([(length, value) for length, value in points if value is not None])
