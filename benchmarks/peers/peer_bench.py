"""Measuring peers beside our variants: in the same rounds, each after a look at what it
computes."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import torch
from peer_list import ALL, CORE, OUR_KEYS, PEERS, Peer
from peer_rows import OURS as OUR_PACKAGE
from peer_rows import PeerRow
from peer_settings import OURS, Ready
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.benchmarking.bench_rows import Row, blank_row
from attnzoo.benchmarking.levels import Work, passes
from attnzoo.benchmarking.measure_setting import Bench, Entry
from attnzoo.benchmarking.plan import Cell, Contender
from attnzoo.benchmarking.timing import MINIMUM_ROUNDS
from attnzoo.registry import Choice, spec_of

SAMPLED_ROWS = 64  # queries whose rows are compared with the formula
WRONG = 1e-3  # relative error from which a peer's results are called wrong
BUILD_LOGS = "peers-build"  # folder in the environment for what failed builds said
ERROR_LINE = re.compile(r"\s*(\w+Error: |\S+: (fatal )?error: )")
LEAK = 1e-5  # relative change of earlier rows from which a causal form is said to leak


@dataclass(frozen=True)
class Entrant(Contender):
    """Our variant of a group (peer: None), or a peer."""

    group: str = ""
    peer: Peer | None = None


def entrants(
    groups: Sequence[str], is_causal: bool, peers: Sequence[Peer] = PEERS
) -> list[Entrant]:
    """Ours of each group first, then its peers in their order; those without the form are left
    out."""
    ours = [
        Entrant(choice, "auto", group)
        for group, choice in OURS.items()
        if group in groups and spec_of(choice.name).runs(is_causal)
    ]
    others = [
        Entrant(Choice(peer.label), "auto", peer.group, peer)
        for peer in peers
        if peer.group in groups and is_causal in peer.causal
    ]
    return ours + others


@dataclass(frozen=True)
class PeerWork(Work):
    """A peer, ready to run, with what is needed to judge it."""

    ready: Ready
    peer: Peer


class PeerBench(Bench):
    """A bench that knows peers."""

    surely = 1.5
    room = math.inf  # seconds for one pass of a peer

    def blank(self, contender: Contender | None, cell: Cell) -> Row:
        row = vars(blank_row(contender, cell))
        if contender is None:
            return PeerRow(
                **row,
                group="exact",
                package=_package("torch"),
                includes=CORE,
                keys=ALL[cell.is_causal],
            )
        assert isinstance(contender, Entrant)
        peer = contender.peer
        if peer is None:
            return PeerRow(
                **row,
                group=contender.group,
                package=OUR_PACKAGE,
                includes=CORE,
                keys=OUR_KEYS.get(contender.group, ALL)[cell.is_causal],
            )
        return PeerRow(
            **row,
            group=peer.group,
            package=_package(peer.package),
            includes=peer.includes,
            keys=peer.keys[cell.is_causal],
        )

    def counted(self, contender: Contender, cell: Cell) -> Attention:
        """The arithmetic of our variant stands for all of its group."""
        assert isinstance(contender, Entrant)
        return OURS[contender.group].build(
            cell.shape.heads, cell.shape.head_dim, max_length=cell.length
        )

    def prepare(self, contender: Contender | None, cell: Cell) -> Work:
        if not isinstance(contender, Entrant) or contender.peer is None:
            return super().prepare(contender, cell)
        peer = contender.peer
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                ready = peer.make(cell)
        except ImportError as error:
            raise ImportError(missing(peer.package, error)) from None
        inputs = [tuple(_to_layout(x, peer) for x in lot) for lot in self.inputs(cell)]
        return PeerWork(passes(cell, inputs, ready.forward, ready.parameters), None, ready, peer)

    def judge(self, row: Row, work: Work, cell: Cell) -> Row:
        if not isinstance(work, PeerWork):
            return super().judge(row, work, cell)
        error, fault = judged(work.peer, work.ready, self.inputs(cell)[0], cell.is_causal)
        return replace(
            cast(PeerRow, row), error=error, fault=fault, compile_seconds=work.ready.compile_seconds
        )

    def measure(
        self, cell: Cell, contenders: Sequence[Contender], rounds: int, budget: float
    ) -> Iterator[PeerRow]:
        """As of every bench; the timed rows also say how long our variant of their group took in
        the same rounds."""
        self.room = budget / MINIMUM_ROUNDS
        timed: list[PeerRow] = []
        for row in super().measure(cell, contenders, rounds, budget):
            assert isinstance(row, PeerRow)
            if row.seconds is None:
                yield row
            else:
                timed.append(row)
        ours = {row.group: row.seconds for row in timed if row.is_ours}
        yield from (replace(row, ours_seconds=ours.get(row.group)) for row in timed)

    def admit(self, contender: Contender | None, cell: Cell, room: float) -> Row | Entry:
        """SDPA and ours are let in whatever they take; a peer when its own passes fit the budget,
        whoever else is there."""
        always = contender is None or cast(Entrant, contender).peer is None
        return super().admit(contender, cell, math.inf if always else self.room)

    def time(self, entries: list[Entry], rounds: int, budget: float) -> list[Row]:
        """Side by side within a round stand those of one group."""
        groups = list(OURS)
        return super().time(
            sorted(entries, key=lambda entry: groups.index(cast(PeerRow, entry.row).group)),
            rounds,
            budget,
        )


@torch.no_grad()
def judged(
    peer: Peer, ready: Ready, inputs: Sequence[Tensor], is_causal: bool
) -> tuple[float | None, str]:
    """The relative error of a sample of rows against the peer's own formula, and a sentence on what
    is wrong, "" when nothing is.

    A causal form must not change its first half when the second half of the input does.
    """
    q, k, v = inputs
    out = _from_layout(ready.forward(*(_to_layout(x, peer) for x in inputs)), q)
    faults, error = [], None
    if ready.formula is not None:
        rows = torch.linspace(0, q.shape[2] - 1, min(SAMPLED_ROWS, q.shape[2])).long()
        wanted = ready.formula(q.double(), k.double(), v.double(), rows, is_causal)
        error = _distance(out[:, :, rows], wanted)
        if not error <= WRONG:
            faults.append(f"off its own formula by {error:.1%}")
    if is_causal:
        half = q.shape[2] // 2
        changed = [torch.cat([x[:, :, :half], x[:, :, half:].roll(1, -1) * 1.5], 2) for x in inputs]
        leak = _distance(
            _from_layout(ready.forward(*(_to_layout(x, peer) for x in changed)), q)[:, :, :half],
            out[:, :, :half].double(),
        )
        if not leak <= LEAK:
            faults.append(f"leaks: later tokens change earlier rows by {leak:.1%}")
    if faults and peer.known:
        faults[-1] += f" ({peer.known})"
    return error, "; ".join(faults)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def _to_layout(x: Tensor, peer: Peer) -> Tensor:
    return x.transpose(1, 2).contiguous() if peer.heads_last else x


def _from_layout(out: Tensor, q: Tensor) -> Tensor:
    """(batch, heads, length, head_dim) of any output: heads first, heads last, or heads folded into
    the width."""
    if out.shape == q.shape:
        return out
    return out.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def missing(distribution: str, error: ImportError) -> str:
    """Why a package cannot be imported: what its build said when setup.sh tried, else the import
    itself."""
    log = Path(sys.prefix) / BUILD_LOGS / f"{distribution}.txt"
    if not log.is_file():
        return f"{error}; benchmarks/peers/setup.sh installs {distribution}"
    said = [
        line.strip()
        for line in log.read_text(errors="replace").splitlines()
        if ERROR_LINE.match(line)
    ]
    return f"{distribution} could not be built: {said[0] if said else 'see ' + str(log)}"


def _package(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution
