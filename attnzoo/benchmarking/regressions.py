"""Two result files of one machine: what got slower beyond the noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from attnzoo.benchmarking.bench_rows import SDPA, Key, Row, check_one_machine

SLOWER = 1.05
RULE = (
    "slower: the median grew by more than 5%, also measured in SDPA's of the same rounds, and the "
    "quartiles do not overlap: the old third "
    "quartile, times what SDPA grew by, lies below the new first"
)


@dataclass(frozen=True)
class Slowdown:
    """A row that had a time and now has a longer one, or none."""

    old: Row
    new: Row

    def sentence(self) -> str:
        """The setting, both times, and how SDPA in the same rounds changed."""
        row = self.new
        where = (
            f"{row.contender}: {row.level} {row.phase}, "
            f"{'causal' if row.is_causal else 'not causal'}, n = {row.length:,}, {row.dtype}"
        )
        if self.old.seconds is None or row.seconds is None:
            return f"{where}: no longer timed ({row.reason})"
        told = (
            f"{where}: {self.old.seconds * 1e3:.4g} ms -> {row.seconds * 1e3:.4g} ms "
            f"({_change(self.old.seconds, row.seconds)}"
        )
        if self.old.sdpa_seconds and row.sdpa_seconds:
            told += f"; SDPA in the same rounds {_change(self.old.sdpa_seconds, row.sdpa_seconds)}"
        return told + ")"


def compare_runs(
    old: Iterable[Row], new: Iterable[Row], *, what: str, against: str
) -> tuple[list[Slowdown], int]:
    """What got slower by `RULE` or lost its time, and how many rows of `new` could be compared.

    A machine's speed changes by half within minutes. So a time is compared after division by the
    growth of SDPA, called directly, in the same rounds; SDPA itself is not compared.

    what, against: the two files in words.
    Raises ValueError, one sentence, when they come from different machines or share no setting.
    """
    before, after = list(old), list(new)
    check_one_machine(
        [row.environment for row in after], [row.environment for row in before], what, against
    )
    known = check_common(before, (row.key for row in after), what=what, against=against)
    pairs = [(known[row.key], row) for row in after if row.key in known]
    return [Slowdown(*pair) for pair in pairs if _is_slower(*pair)], len(pairs)


def check_common(
    old: Iterable[Row], keys: Iterable[Key], *, what: str, against: str
) -> dict[Key, Row]:
    """The timed rows of `old` by key. Raises ValueError when none of the keys is among theirs."""
    known = {row.key: row for row in old if row.seconds is not None and row.variant != SDPA}
    if known.keys().isdisjoint(keys):
        raise ValueError(
            f"{what} and {against} have no timed setting in common; give a file of the same "
            "configuration"
        )
    return known


def sdpa_growth(old: Iterable[Row], new: Iterable[Row]) -> float | None:
    """The median over settings of SDPA's new time divided by its old one: the machine's doing, or
    torch's. None without a common setting."""
    before = {row.key: row.seconds for row in old if row.variant == SDPA and row.seconds}
    ratios = [row.seconds / before[row.key] for row in new if row.key in before and row.seconds]
    return median(ratios) if ratios else None


def _is_slower(old: Row, new: Row) -> bool:
    if old.seconds is None or new.seconds is None:
        return True
    if old.seconds_quartiles is None or new.seconds_quartiles is None:
        return False
    machine = (
        max(1.0, new.sdpa_seconds / old.sdpa_seconds)
        if old.sdpa_seconds and new.sdpa_seconds
        else 1.0
    )
    return (
        new.seconds > SLOWER * machine * old.seconds
        and machine * old.seconds_quartiles[1] < new.seconds_quartiles[0]
    )


def _change(old: float, new: float) -> str:
    return f"{(new / old - 1) * 100:+.0f}%"
