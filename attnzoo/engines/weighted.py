"""Sums of attentions: A = Σ_b g_b A_b, each A_b another engine's of another call, and g_b a factor
of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import Backend, Engine, accumulation_dtype


@dataclass(frozen=True)
class Branch:
    """One of the attentions that are summed.

    engine: what multiplies by its A_b
    call: what it is asked for, with as many heads, queries and keys as the others
    factor: g_b, broadcastable to (batch, heads, query_length, 1); None: 1
    """

    engine: Engine
    call: Call
    factor: Tensor | None = None

    def weighed(self, rows: Tensor) -> Tensor:
        """g_b times rows of A_b or of A_b·v, in the precision of sums."""
        rows = rows.to(accumulation_dtype(rows.dtype))
        return rows if self.factor is None else rows * self.factor.to(rows.dtype)


@dataclass(frozen=True)
class _Asked(Call):
    """A call of which it is found once who is asked for what, whatever backend is to do it."""

    found: list[Sequence[Branch]] = field(default_factory=list)

    def branches_of(self, engine: Weighted) -> Sequence[Branch]:
        if not self.found:
            self.found.append(engine.asked(self))
        return self.found[0]


class Weighted(Engine):
    """An engine whose A is a sum of others'. A subclass says which by `branches`, and lists its
    backends, each made by `of_branches`."""

    def branches(self, call: Call) -> Sequence[Branch]:
        """What is summed for a call that is complete."""
        raise NotImplementedError

    def asked(self, call: Call) -> Sequence[Branch]:
        """As `branches`, of which no factor is read: who is asked for what."""
        return self.branches(call)

    def choose(self, call: Call, requested: str) -> Backend:
        return super().choose(_Asked(**vars(call)), requested)

    def matrix(self, call: Call) -> Tensor:
        found = [one.weighed(one.engine.matrix(one.call)) for one in self.branches(call)]
        return sum(found[1:], found[0])


def of_branches(like: Backend) -> Backend:
    """The backend that runs every branch by its engine's own backend of this name, and refuses what
    one of them refuses. like: of the engines of the branches, whose other properties it has."""

    def run(engine: Weighted, call: Call) -> Tensor:
        total = None
        for one in engine.branches(call):
            rows = one.weighed(_own(one.engine, like.name).run(one.engine, one.call))
            total = rows if total is None else total + rows
        assert total is not None
        return total.to(call.q.dtype)

    def why_not(engine: Weighted, call: Call) -> str | None:
        asked = call.branches_of(engine) if isinstance(call, _Asked) else engine.asked(call)
        reasons = (_own(one.engine, like.name).why_not(one.engine, one.call) for one in asked)
        return next((reason for reason in reasons if reason is not None), None)

    return Backend(like.name, run, why_not, packs=like.packs)


def _own(engine: Engine, name: str) -> Backend:
    return next(one for one in engine.backends if one.name == name)
