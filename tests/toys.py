"""Attention variants that are wrong, random or untrained on purpose, for tests of what measures
variants."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from attnzoo.attention import Attention, Spec
from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import Backend, Cost, Engine, Shape, never_refuses
from attnzoo.engines.softmax.reference import visible
from attnzoo.registry import spec_of


class UniformEngine(Engine):
    """A_ij = 1 / (number of visible keys): answers mean(v), in a reference and in a `fast`
    backend."""

    def cost(self, shape: Shape) -> Cost:
        return Cost(1000, 1000)


def uniform(engine: Engine, call: Call) -> Tensor:
    mask = visible(call)
    ones = call.q.new_ones(*call.q.shape[:3], call.key_length)
    weights = ones if mask is None else ones * mask
    return weights / weights.sum(-1, keepdim=True) @ repeat_heads(call.v, call.group)


def doubled(engine: Engine, call: Call) -> Tensor:
    return 2 * uniform(engine, call)


def not_a_number(engine: Engine, call: Call) -> Tensor:
    return uniform(engine, call) * float("nan")


class RightEngine(UniformEngine):
    backends = (
        Backend("fast", uniform, never_refuses),
        Backend("reference", uniform, never_refuses),
    )


class WrongEngine(UniformEngine):
    backends = (
        Backend("fast", doubled, never_refuses),
        Backend("reference", uniform, never_refuses),
    )


class NaNEngine(UniformEngine):
    backends = (
        Backend("fast", not_a_number, never_refuses),
        Backend("reference", uniform, never_refuses),
    )


class DrawnEngine(UniformEngine):
    """Answers `factor` · mean(v)."""

    backends = (
        Backend(
            "reference", lambda engine, call: engine.factor * uniform(engine, call), never_refuses
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0


def _spec(name: str) -> Spec:
    return replace(
        spec_of("standard"),
        name=name,
        family="kernel",
        exact=False,
        attn_mask=False,
        dropout=False,
        decodes=False,
    )


class Uniform(Attention):
    """Right, and the base of those that are not."""

    spec = _spec("uniform")
    make_engine: ClassVar[type[Engine]] = RightEngine

    def __init__(self, heads: int, head_dim: int, *, backend: str = "auto") -> None:
        super().__init__(heads, head_dim, self.make_engine(), backend=backend)


class Wrong(Uniform):
    spec = _spec("wrong")
    make_engine = WrongEngine


class NotANumber(Uniform):
    spec = _spec("not_a_number")
    make_engine = NaNEngine


class Untrained(Uniform):
    """Uniform, with 5 parameters that nothing has trained."""

    spec = _spec("untrained")

    def __init__(self, heads: int, head_dim: int, *, backend: str = "auto") -> None:
        super().__init__(heads, head_dim, backend=backend)
        self.mixture = nn.Parameter(torch.randn(5))


class Drawn(Uniform):
    """Each draw answers another multiple of mean(v)."""

    spec = _spec("drawn")
    make_engine = DrawnEngine

    def redraw(self) -> None:
        assert isinstance(self.engine, DrawnEngine)
        self.engine.factor = 1.0 + float(torch.rand(()))


TOYS = {toy.spec.name: toy for toy in (Uniform, Wrong, NotANumber, Untrained, Drawn)}
