"""Two result files of one machine: what got slower beyond the noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnzoo.bench.rows import Key, Row, check_one_machine

SLOWER = 1.05
RULE = "slower: the median grew by more than 5% and the quartiles do not overlap (the old third quartile lies below the new first)"


@dataclass(frozen=True)
class Slowdown:
    """A row that had a time and now has a longer one, or none."""

    old: Row
    new: Row

    def sentence(self) -> str:
        """The setting, both times, and how SDPA in the same rounds changed: when that grew alike, the machine was slow."""
        row = self.new
        where = f"{row.contender}: {row.level} {row.phase}, {'causal' if row.is_causal else 'not causal'}, n = {row.length:,}, {row.dtype}"
        if self.old.seconds is None or row.seconds is None:
            return f"{where}: no longer timed ({row.reason})"
        told = f"{where}: {self.old.seconds * 1e3:.4g} ms -> {row.seconds * 1e3:.4g} ms ({_change(self.old.seconds, row.seconds)}"
        if self.old.sdpa_seconds and row.sdpa_seconds and row.variant != "sdpa":
            told += f"; SDPA in the same rounds {_change(self.old.sdpa_seconds, row.sdpa_seconds)}"
        return told + ")"


def compare_runs(old: Iterable[Row], new: Iterable[Row], *, what: str, against: str) -> tuple[list[Slowdown], int]:
    """What got slower by `RULE` or lost its time, and how many rows of `new` could be compared. what, against: the two files in words.

    Raises ValueError, one sentence, when they come from different machines or share no setting.
    """
    before, after = list(old), list(new)
    check_one_machine([row.environment for row in after], [row.environment for row in before], what, against)
    known: dict[Key, Row] = {row.key: row for row in before if row.seconds is not None}
    pairs = [(known[row.key], row) for row in after if row.key in known]
    if not pairs:
        raise ValueError(f"{what} and {against} have no timed setting in common; give a file of the same configuration")
    return [Slowdown(*pair) for pair in pairs if _is_slower(*pair)], len(pairs)


def _is_slower(old: Row, new: Row) -> bool:
    if old.seconds is None or new.seconds is None:
        return True
    if old.seconds_quartiles is None or new.seconds_quartiles is None:
        return False
    return new.seconds > SLOWER * old.seconds and old.seconds_quartiles[1] < new.seconds_quartiles[0]


def _change(old: float, new: float) -> str:
    return f"{(new / old - 1) * 100:+.0f}%"
