"""One line of a comparison with other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnzoo.benchmarking.bench_rows import Row

OURS = "attnzoo"  # the package of our own rows


@dataclass(frozen=True)
class PeerRow(Row):
    """A benchmark row with what a comparison needs to say beside the numbers. `label` names the
    contender within `group`.

    group: those of one mathematics. package: distribution and version. includes: what is in the
    time. keys: how many keys a row sees.
    ours_seconds: median of our variant of the same group in the same rounds. compile_seconds: what
    was spent once, before any time taken.
    fault: what is wrong with its results, in a sentence; measured, and the row keeps its time.
    error: largest relative error of a row of the output against the formula in float64; None where
    there is no formula.
    """

    FORMAT: ClassVar[str] = "attnzoo.peers/1"
    COMMAND: ClassVar[str] = "benchmarks/peers/run.py"

    group: str = ""
    package: str = ""
    includes: str = ""
    keys: str = ""
    ours_seconds: float | None = None
    compile_seconds: float | None = None
    error: float | None = None
    fault: str = ""

    @property
    def is_ours(self) -> bool:
        return self.package == OURS

    @property
    def times_ours(self) -> float | None:
        """How many times our time this one is; above 1 we are faster."""
        return (
            None if not self.seconds or not self.ours_seconds else self.seconds / self.ours_seconds
        )
