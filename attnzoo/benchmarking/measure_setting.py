"""Measuring one setting on one device: its contenders are checked, timed in turns with SDPA, and
make a row each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.benchmarking import arithmetic
from attnzoo.benchmarking.bench_rows import LATE, SDPA, Key, Row, blank_row
from attnzoo.benchmarking.cuda_timing import captured, check_answers, stopwatch_of
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.heap import out_of_memory, settle_heap
from attnzoo.benchmarking.levels import (
    Pass,
    Work,
    choice_for,
    core_inputs,
    layer_inputs,
    prepare,
    segments_of,
)
from attnzoo.benchmarking.machine_limits import Limits, measure_limits
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.plan import MOST_TOKENS, Cell, Contender
from attnzoo.benchmarking.timing import (
    MINIMUM_ROUNDS,
    Timing,
    decoding_mistake,
    interleave,
    mistake,
)

INPUT_SETS = {"cpu": 1, "cuda": 4}  # on CUDA several, so that no run finds its inputs in a cache
SHORT_PASS = 0.5  # seconds
MOST_REPEATS = 64


@dataclass
class Entry:
    """A contender that passed: its row so far, what runs, and how often a turn repeats it."""

    row: Row
    run: Pass
    seconds: float
    on_cuda: bool

    def repeats(self, shortest: float) -> int:
        """Enough for a turn of `shortest` seconds; once on CUDA, where the cache is flushed before
        each turn."""
        if self.on_cuda:
            return 1
        most = MOST_TOKENS if self.row.phase == "decode" else MOST_REPEATS
        return max(1, min(most, math.ceil(shortest / max(self.seconds, 1e-9))))


class Bench:
    """One device, with the limits measured so far and how long each contender took at shorter
    lengths."""

    shortest_turn = 0.02  # seconds: a shorter pass is repeated within its turn
    # Times over the room for a pass: an expectation so far above it spares the try, a first pass
    # the check
    surely = 4.0

    def __init__(self, device: torch.device, seed: int) -> None:
        settle_heap()
        if device.type == "cuda":
            # The allocator's cache and Triton's launches go by the current device.
            torch.cuda.set_device(device)
        self.device, self.seed = device, seed
        self.stopwatch = stopwatch_of(device)
        self.facts = environment(seed=seed, device=device)
        self.limits: dict[str, Limits] = {}
        self.prepared: tuple[Cell, list[tuple[Tensor, ...]]] | None = None
        # By curve: work and seconds at the last length that was measured.
        self.seen: dict[Key, tuple[int, float]] = {}

    def measure(
        self, cell: Cell, contenders: Sequence[Contender], rounds: int, budget: float
    ) -> Iterator[Row]:
        """Rows of one setting: those without a time as soon as that is known, the timed ones
        together at the end."""
        entries: list[Entry] = []
        room = budget / MINIMUM_ROUNDS  # seconds for one round of all contenders
        for contender in [None, *contenders]:
            found = self.admit(contender, cell, room - sum(entry.seconds for entry in entries))
            if isinstance(found, Row):
                yield found
            else:
                entries.append(found)
            # Without this check, all that follow would be called wrong because of this one.
            check_answers(self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not entries:
            return
        try:
            rows = self.time(entries, rounds, budget)
        except Exception as error:
            rows = [replace(entry.row, reason=_failure(error)) for entry in entries]
        yield from rows
        check_answers(self.device)

    def blank(self, contender: Contender | None, cell: Cell) -> Row:
        """The row of a contender before anything is measured."""
        return blank_row(contender, cell)

    def prepare(self, contender: Contender | None, cell: Cell) -> Work:
        """A contender, ready to run."""
        return prepare(contender, cell, self.inputs(cell), self.seed)

    def counted(self, contender: Contender, cell: Cell) -> Attention | None:
        """The attention whose closed form counts a contender's work, or None when there is no such
        form."""
        choice = choice_for(contender, cell, self.seed)
        return choice.build(cell.shape.heads, cell.shape.head_dim)

    def judge(self, row: Row, work: Work, cell: Cell) -> Row:
        """The row after a look at what the work computes: with a reason when it must get no
        time."""
        if work.attention is None:
            return row
        row = replace(row, ran=work.attention.last_backend)
        return replace(row, reason=self._mistake(work.attention, cell) or "")

    def admit(self, contender: Contender | None, cell: Cell, room: float) -> Row | Entry:
        """Build, run once, check and weigh one contender: an entry for the rounds, or a row with
        the reason why there is none."""
        row = replace(self.blank(contender, cell), environment=self.facts)
        try:
            row = self._with_amounts(row, contender, cell)
            expected = self._expected_seconds(row)
            if expected > self.surely * room:
                return self._late(
                    row,
                    f"a pass would take about {expected:.2g} s by its work and its time at a "
                    "shorter length",
                    room,
                )
            work = self.prepare(contender, cell)
            seconds = self.stopwatch(work.run)
            if seconds > self.surely * room and self.device.type == "cpu":
                self.seen[self._curve(row)] = (_work(row), seconds)
                return self._late(row, f"a pass takes {seconds:.2g} s", room)
            row = self.judge(row, work, cell)
            if row.reason:
                return row
            # A first pass is made of what later ones need not do again; one that is long, but not
            # too long, may stand for them all the same.
            if not SHORT_PASS <= seconds <= room or self.device.type == "cuda":
                seconds = self.stopwatch(work.run)
            self.seen[self._curve(row)] = (_work(row), seconds)
            if seconds > room:
                return self._late(row, f"a pass takes {seconds:.2g} s", room)
            return Entry(
                replace(row, peak_bytes=peak_bytes(work.run, self.device)),
                work.run,
                seconds,
                self.device.type == "cuda",
            )
        except ValueError as error:  # what the variant or the backend cannot do
            return replace(row, reason=str(error))
        except Exception as error:
            # Any error: Triton has its own, and a kernel that does not compile must not end the
            # sweep.
            return replace(row, reason=_failure(error))

    def time(self, entries: list[Entry], rounds: int, budget: float) -> list[Row]:
        """The rows of contenders that passed, timed in turns."""
        repeats = {
            number: entry.repeats(self.shortest_turn) for number, entry in enumerate(entries)
        }
        calls: dict[str, Pass] = {
            str(number): partial(_repeat, entry.run, repeats[number])
            for number, entry in enumerate(entries)
        }
        # Every contender has run at least twice by now.
        timings = interleave(
            calls, rounds=rounds, warmups=0, budget=budget, stopwatch=self.stopwatch
        )
        graphs = self._time_graphs(entries, rounds, budget) if self.device.type == "cuda" else {}
        sdpa = next(
            (number for number, entry in enumerate(entries) if entry.row.variant == SDPA), None
        )
        rows = []
        for number, entry in enumerate(entries):
            timing = _divided(timings[str(number)], repeats[number])
            row = replace(
                entry.row,
                seconds=timing.median,
                seconds_quartiles=timing.quartiles,
                rounds=len(timing.seconds),
                graph_seconds=graphs.get(str(number)),
            )
            if sdpa is not None:
                row = replace(
                    row,
                    sdpa_seconds=timings[str(sdpa)].median / repeats[sdpa],
                    sdpa_peak_bytes=entries[sdpa].row.peak_bytes,
                )
            rows.append(row.within_limits())
        return rows

    def _time_graphs(self, entries: list[Entry], rounds: int, budget: float) -> dict[str, float]:
        """Medians of the passes replayed as CUDA graphs, one after another: each keeps all the
        memory of its pass while it is there, and all of them at once may have none left. Whatever
        happens here, the times taken before stand. Decoding, whose state changes in Python, and
        packed rows, which are cut by their ids, are left out."""
        found = {}
        for number, entry in enumerate(entries):
            if entry.row.phase == "decode" or entry.row.segments > 1:
                continue
            try:
                replay = captured(entry.run, self.device)
                if replay is not None:
                    timing = interleave(
                        {"": replay},
                        rounds=rounds,
                        budget=budget / len(entries),
                        stopwatch=self.stopwatch,
                    )[""]
                    found[str(number)] = timing.median
                    del replay
            # A graph of its own without a time; a device that is lost is found out by who asks next
            except Exception:
                continue
        return found

    def _with_amounts(self, row: Row, contender: Contender | None, cell: Cell) -> Row:
        exact = arithmetic.exact(cell)
        attention = exact if contender is None else self.counted(contender, cell)
        limits, least_bytes = (
            self._limits(cell.dtype),
            arithmetic.least_bytes(attention or exact, cell),
        )
        return replace(
            row,
            macs=None if attention is None else arithmetic.macs(attention, cell),
            sdpa_macs=arithmetic.macs(exact, cell),
            least_bytes=least_bytes,
            peak_flops=limits.peak_flops,
            bandwidth=limits.bandwidth_of(least_bytes),
        )

    def _limits(self, dtype: str) -> Limits:
        if dtype not in self.limits:
            self.limits[dtype] = measure_limits(self.device, getattr(torch, dtype), self.stopwatch)
        return self.limits[dtype]

    def inputs(self, cell: Cell) -> list[tuple[Tensor, ...]]:
        """The same sets for all contenders of a cell, made once."""
        if self.prepared is None or self.prepared[0] != cell:
            self.prepared = None  # the last cell's go before new ones come
            make = core_inputs if cell.level == "core" else layer_inputs
            self.prepared = cell, make(cell, INPUT_SETS[self.device.type], self.device, self.seed)
        return self.prepared[1]

    def _mistake(self, attention: Attention, cell: Cell) -> str | None:
        q, k, v = core_inputs(cell, 1, self.device, self.seed)[0]
        if cell.phase == "decode":
            return decoding_mistake(attention, q, k, v)
        how = {"is_causal": cell.is_causal, "segments": segments_of(cell, q)}
        return mistake(attention, q, k, v, backward=cell.phase == "forward+backward", **how)

    def _late(self, row: Row, why: str, room: float) -> Row:
        return replace(
            row,
            reason=f"{LATE}: {why}, and {MINIMUM_ROUNDS} rounds leave {max(room, 0.0):.2g} s for "
            "one",
        )

    def _expected_seconds(self, row: Row) -> float:
        seen = self.seen.get(self._curve(row))
        return 0.0 if seen is None else seen[1] * _work(row) / seen[0]

    def _curve(self, row: Row) -> Key:
        return (*row.setting, row.label, row.backend)


def _work(row: Row) -> int:
    return row.macs or row.least_bytes or 1


def _repeat(run: Pass, times: int) -> None:
    for _ in range(times):
        run()


def _divided(timing: Timing, times: int) -> Timing:
    return Timing(tuple(seconds / times for seconds in timing.seconds))


def _failure(error: BaseException) -> str:
    said = " ".join(str(error).split())[:300]
    return (
        f"out of memory: {said}"
        if out_of_memory(error)
        else f"failed with {type(error).__name__}: {said}"
    )
