"""One line of a result file of `attnzoo bench`, and the file itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from attnzoo.benchmarking.environment import MACHINE
from attnzoo.benchmarking.plan import Cell, Contender
from attnzoo.registry import Choice
from attnzoo.results import result_file

SDPA = "sdpa"  # the variant of the rows that call torch's SDPA directly

LATE = "over the time budget"  # how the reason of a row begins that another try may give a time

Key = tuple[Any, ...]
Environment = dict[str, str] | None


@dataclass(frozen=True)
class Row:
    """One attention in one setting. None where there is no number; `reason` then says why.

    level: core (attention alone), multihead (with its projections) or layer (a whole pre-norm
    layer).
    phase: forward, forward+backward, or decode (one new token after `length`, always causal).
    backend: as asked for.
    ran: the one that ran.
    seconds: median of one pass over `rounds` interleaved rounds, with its quartiles.
    graph_seconds: the same pass replayed as a CUDA graph.
    sdpa_seconds: median of exact SDPA, called directly, in the same rounds.
    segments: equal pieces that the row of `length` tokens is packed of; SDPA then gets the pieces
    as samples of a batch.
    peak_bytes: highest sum of allocations during one pass beyond its inputs.
    sdpa_peak_bytes: the same for SDPA.
    macs: what one pass executes (exact attention: its support, since SDPA skips the masked half;
    forward+backward: three forwards); None when decoding.
    least_bytes: inputs, outputs, weights and state, each moved once.
    sdpa_macs: the MACs of SDPA.
    peak_flops: FLOPs a second, the best that was measured on this machine in the same run.
    bandwidth: bytes a second, likewise, of as much data.
    """

    FORMAT: ClassVar[str] = "attnzoo.bench/1"
    COMMAND: ClassVar[str] = "attnzoo bench"

    level: str
    phase: str
    is_causal: bool
    variant: str
    options: dict[str, Any]
    label: str
    backend: str
    length: int
    dtype: str
    batch_size: int
    heads: int
    head_dim: int
    segments: int = 1
    ran: str | None = None
    seconds: float | None = None
    seconds_quartiles: tuple[float, float] | None = None
    rounds: int = 0
    graph_seconds: float | None = None
    sdpa_seconds: float | None = None
    peak_bytes: int | None = None
    sdpa_peak_bytes: int | None = None
    macs: int | None = None
    sdpa_macs: int | None = None
    least_bytes: int | None = None
    peak_flops: float | None = None
    bandwidth: float | None = None
    reason: str = ""
    environment: dict[str, str] | None = None

    @property
    def key(self) -> Key:
        """What a row is about: two rows with one key measure the same."""
        return (*self.setting, self.length, self.label, self.backend)

    @property
    def setting(self) -> Key:
        """What the rows of one curve and of its rivals share: everything but the length and the
        attention."""
        return (
            self.level,
            self.phase,
            self.is_causal,
            self.dtype,
            self.batch_size,
            self.heads,
            self.head_dim,
            self.segments,
        )

    @property
    def contender(self) -> str:
        """The attention in words, with the backend when one was asked for by name."""
        return self.label if self.backend == "auto" else f"{self.label} [{self.backend}]"

    @property
    def tokens_per_second(self) -> float | None:
        tokens = self.batch_size * (1 if self.phase == "decode" else self.length)
        return None if not self.seconds else tokens / self.seconds

    @property
    def flops_per_second(self) -> float | None:
        return None if not self.seconds or self.macs is None else 2 * self.macs / self.seconds

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes that must move at least, a second."""
        return (
            None
            if not self.seconds or self.least_bytes is None
            else self.least_bytes / self.seconds
        )

    @property
    def speedup(self) -> float | None:
        return (
            None if not self.seconds or not self.sdpa_seconds else self.sdpa_seconds / self.seconds
        )

    @property
    def kept_speedup(self) -> float | None:
        """Measured speed-up over MAC speed-up: (t_sdpa / t) / (macs_sdpa / macs)."""
        speedup = self.speedup
        return (
            None
            if speedup is None or not self.macs or not self.sdpa_macs
            else speedup / (self.sdpa_macs / self.macs)
        )

    @property
    def limit_seconds(self) -> float | None:
        """The least time: all FLOPs at the measured peak, or all bytes at the measured bandwidth,
        whichever takes longer."""
        if not self.peak_flops or not self.bandwidth or self.least_bytes is None:
            return None
        return max(2 * (self.macs or 0) / self.peak_flops, self.least_bytes / self.bandwidth)

    @property
    def limit_share(self) -> float | None:
        """The fraction of the limit that was reached, 1 being as fast as the machine can."""
        limit = self.limit_seconds
        return None if limit is None or not self.seconds else limit / self.seconds

    @property
    def is_late(self) -> bool:
        """Whether the row has no time because there was none for it, so that it is worth another
        try."""
        return self.reason.startswith(LATE)

    def within_limits(self) -> Self:
        """The row with the machine's limits at no less than what the row itself reached: its speed
        may have risen since they were measured."""
        flops, moved = self.flops_per_second or 0.0, self.bytes_per_second or 0.0
        if not self.peak_flops or not self.bandwidth:
            return self
        return replace(
            self, peak_flops=max(self.peak_flops, flops), bandwidth=max(self.bandwidth, moved)
        )

    def to_json(self) -> str:
        """One line, with the derived numbers beside the measured ones for readers of the file."""
        derived = (
            "tokens_per_second",
            "flops_per_second",
            "bytes_per_second",
            "kept_speedup",
            "limit_seconds",
            "limit_share",
        )
        return json.dumps(
            {
                "format": self.FORMAT,
                **asdict(self),
                **{name: getattr(self, name) for name in derived},
            },
            allow_nan=False,
        )

    @classmethod
    def from_fields(cls, found: dict[str, Any]) -> Self:
        """The row of a parsed line, whose derived numbers are not read."""
        # Files of before there were packed rows do not say how many pieces.
        known = result_file.fields_of(cls, {"segments": 1, **found})
        quartiles = known["seconds_quartiles"]
        return cls(
            **{
                **known,
                "seconds_quartiles": None
                if quartiles is None
                else (float(quartiles[0]), float(quartiles[1])),
            }
        )


def blank_row(contender: Contender | None, cell: Cell) -> Row:
    """The row of a contender (None: SDPA called directly) before anything is measured."""
    choice = Choice(SDPA) if contender is None else contender.choice
    backend = "auto" if contender is None else contender.backend
    return Row(
        cell.level,
        cell.phase,
        cell.is_causal,
        choice.name,
        dict(choice.options),
        choice.label,
        backend,
        cell.length,
        cell.dtype,
        *astuple(cell.shape),
        segments=cell.segments,
    )


RowKind = TypeVar("RowKind", bound=Row)


class ResultFile(result_file.ResultFile[RowKind]):
    """A JSONL file of rows of one kind."""

    def __init__(self, path: str | Path, kind: type[RowKind] = Row) -> None:
        super().__init__(path, kind)


def read_rows(path: str | Path, kind: type[RowKind] = Row) -> list[RowKind]:
    """The rows of a result file in order; a half last line is passed over. Raises ValueError, one
    sentence, on another file."""
    return result_file.read_rows(path, kind)


def check_one_machine(
    some: Iterable[Environment], others: Iterable[Environment], what: str, against: str
) -> None:
    """Raise ValueError when environments of rows are of two machines.

    what, against: where the two lots are from, in words.
    """
    here, there = (
        {tuple((facts or {}).get(name) for name in MACHINE) for facts in lot}
        for lot in (some, others)
    )
    for one in here:
        for other in there - {one}:
            name, mine, theirs = next(
                found for found in zip(MACHINE, one, other, strict=True) if found[1] != found[2]
            )
            raise ValueError(
                f"{what} and {against} are from different machines ({name}: {mine} and {theirs}), "
                "and times of two machines cannot be compared"
            )
