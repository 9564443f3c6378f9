"""The engine of differential attention: one softmax less a part of another, over the same values.

    A = A_1 - λ A_2

Where rows are of half precision the maps are computed in float32, since most of them cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attnzoo.call import Call
from attnzoo.engines.engine import Cost, Shape, accumulation_dtype
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.sdpa import FEW_ROWS
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.weighted import Branch, Weighted, of_branches
from attnzoo.spec import Input

#: λ of every row, where none is learned.
SUBTRACTION = Input("subtraction", "batch heads queries", activation=torch.sigmoid)
SPREAD = 0.1  # of the numbers that λ is made of, at first


class Lambda(nn.Module):
    """λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init,    λ_init = 0.8 − 0.6 exp(−0.3 · layer)

    Source: Ye et al., Differential Transformer, 2024, arXiv:2410.05258, equations 2 and 3; layers
    count from 0, as in its code.
    """

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.initial = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(torch.empty(width)) for _ in range(4))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for one in self.parameters():
            one.normal_(0, SPREAD)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """λ in the dtype of the sums."""
        q1, k1, q2, k2 = (x.to(dtype) for x in (self.q1, self.k1, self.q2, self.k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.initial

    def number(self) -> float:
        """λ, as of no use to autograd."""
        first, second = self.q1.dot(self.k1).item(), self.q2.dot(self.k2).item()
        return math.exp(first) - math.exp(second) + self.initial


class TwoMaps(Weighted, Softmax):
    """Two softmaxes by the halves of queries and keys.

    scale: factor of the products, 1/sqrt(head_dim / 2) by default
    learned: λ; None: a call brings it for every row, as `SUBTRACTION`, or it is 1/2

    Its backends are `native_row`, one query in C++, where that has been compiled, and those of the
    softmax engine; `sdpa` takes values that are wider than keys beside keys that are filled up with
    zeros, which was faster than tiles of the widths as they are.
    """

    def __init__(self, scale: float | None, learned: Lambda | None) -> None:
        super().__init__(scale)
        self.learned = learned
        self.map = Softmax(scale)

    def subtracted(self, call: Call) -> Tensor:
        """λ in the precision of sums, a number or (batch, heads, query_length)."""
        dtype, given = accumulation_dtype(call.q.dtype), call.get(SUBTRACTION.name)
        if self.learned is not None:
            return self.learned(dtype)
        return call.q.new_tensor(0.5, dtype=dtype) if given is None else given.to(dtype)

    def branches(self, call: Call) -> Sequence[Branch]:
        first, second = self.asked(call)
        return first, replace(second, factor=-self.subtracted(call)[..., None])

    def scale_of(self, q: Tensor) -> float:
        return self.map.scale_of(q[..., : q.shape[3] // 2])

    def asked(self, call: Call) -> Sequence[Branch]:
        dtype = accumulation_dtype(call.q.dtype)
        q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
        first, second = (
            replace(call, q=one, k=other, v=v, inputs={})
            for one, other in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        )
        return Branch(self.map, first), Branch(self.map, second)

    def with_past(self, call: Call, state: KeyValueCache) -> tuple[Call, KeyValueCache]:
        whole, state = super().with_past(call, state)
        given = call.get(SUBTRACTION.name)
        return whole if given is None else whole.giving(SUBTRACTION, given), state

    def cost(self, shape: Shape) -> Cost:
        found = super().cost(shape)
        doubled = ("macs", "support_macs", "skipped_macs", "elementwise")
        found = replace(found, **{name: 2 * getattr(found, name) for name in doubled})
        if shape.query_length <= FEW_ROWS < shape.key_length:  # whose keys are not filled up
            of_halves = {name: getattr(found, name) * 3 // 4 for name in doubled[:3]}
            found = replace(found, **of_halves)
        if self.learned is not None:  # the exponentials of λ
            return replace(found, elementwise=found.elementwise + 2)
        rows = shape.batch_size * shape.heads * shape.query_length
        return replace(found, moved_bytes=found.moved_bytes + rows * shape.dtype.itemsize)


def _one_row(engine: TwoMaps, call: Call) -> Tensor:
    given = call.get(SUBTRACTION.name)
    if engine.learned is not None or given is None:
        number = 0.5 if engine.learned is None else engine.learned.number()
        subtracted = call.q.new_full((1, 1), number)
    else:
        subtracted = given.to(call.q.dtype)
    return one_row.attend(engine, call, subtracted=subtracted)


TwoMaps.backends = (one_row.backend(_one_row), *map(of_branches, Softmax.backends))
