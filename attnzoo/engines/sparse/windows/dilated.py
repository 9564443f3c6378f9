"""Dilated windows, in which a query sees only every dilation-th key around it.

Positions with the same remainder modulo the dilation form a class, a sequence of their own, in
which the window is plain (its dilation is 1). The classes are folded into the batch, and any
function that attends to plain windows runs on them. Heads of one dilation are computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, kv_heads_of
from attnzoo.engines.engine import Shape
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, every
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows import window_plan

AttendWindow = Callable[[Window, Call], Tensor]  # computes A·v of a call under a window


@dataclass(frozen=True)
class Fold:
    """How positions become (classes, places): position p is place p // dilation of class p %
    dilation.

    dilation: the number of classes
    ahead: empty rows before the first query, so that the first row belongs to class 0
    spare: empty rows and slots at the end, so that all classes are equally long
    """

    dilation: int
    ahead: int
    spare: int

    @classmethod
    def of(cls, dilation: int, query_length: int, key_length: int) -> Fold:
        return cls(dilation, (key_length - query_length) % dilation, -key_length % dilation)

    def queries(self, x: Tensor) -> Tensor:
        """(batch, heads, query_length, d) -> (batch · dilation, heads, places, d), contiguous."""
        return self._folded(
            F.pad(x, (0, 0, self.ahead, self.spare)) if self.ahead or self.spare else x
        )

    def keys(self, x: Tensor) -> Tensor:
        """(batch, kv_heads, key_length, d) -> (batch · dilation, kv_heads, places, d),
        contiguous."""
        return self._folded(F.pad(x, (0, 0, 0, self.spare)) if self.spare else x)

    def _folded(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.dilation)).permute(0, 3, 1, 2, 4).contiguous().flatten(0, 1)

    def key_mask(self, call: Call) -> Tensor | None:
        """The folded key_mask, (batch · dilation, places) bool, which also hides the empty slots at
        the end; None where nothing is to be hidden. A causal call need not hide empty slots, since
        no real row comes after them."""
        mask = call.key_mask
        if mask is None:
            if call.is_causal or not self.spare:
                return None
            mask = torch.ones(
                call.k.shape[0], call.key_length, dtype=torch.bool, device=call.k.device
            )
        return F.pad(mask, (0, self.spare)).unflatten(1, (-1, self.dilation)).mT.flatten(0, 1)

    def rows(self, out: Tensor, query_length: int) -> Tensor:
        """The inverse of `queries`, for the output: (batch · dilation, heads, places, d) -> (batch,
        heads, query_length, d)."""
        whole = out.unflatten(0, (-1, self.dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return whole[:, :, self.ahead : self.ahead + query_length]

    def shape(self, shape: Shape) -> Shape:
        """The sizes of the folded call, from those of the whole call."""
        queries, keys = self.ahead + shape.query_length + self.spare, shape.key_length + self.spare
        batch_size = shape.batch_size * self.dilation
        return replace(
            shape,
            batch_size=batch_size,
            query_length=queries // self.dilation,
            key_length=keys // self.dilation,
        )


def attend(pattern: Window, call: Call, attend_window: AttendWindow) -> Tensor:
    """A·v for a window of any dilation, (batch, heads, query_length, value_dim).

    pattern: the window, whose heads may differ in dilation
    call: the whole call
    attend_window: computes A·v under a plain window
    """
    return by_dilation(
        pattern, call, lambda window, part: of_one_dilation(window, part, attend_window)
    )


def by_dilation(pattern: Window, call: Call, attend_heads: AttendWindow) -> Tensor:
    """A·v, with the heads of each dilation computed by themselves.

    pattern: the window, whose heads may differ in dilation
    call: the whole call
    attend_heads: computes A·v for some heads, from their window, which has one dilation, and their
        part of the call
    """
    groups = pattern.heads_by_dilation(call.q.shape[1])
    if len(groups) == 1:
        (dilation,) = groups
        return attend_heads(pattern.dilated(dilation), call)
    outs = [
        attend_heads(pattern.dilated(dilation), call.select(heads=heads))
        for dilation, heads in groups.items()
    ]
    order = torch.tensor(
        [head for heads in groups.values() for head in heads], device=call.q.device
    )
    return torch.cat(outs, 1).index_select(1, order.argsort())


def of_one_dilation(pattern: Window, call: Call, attend_window: AttendWindow) -> Tensor:
    """A·v for a window with one dilation for all heads.

    pattern: the window
    call: the whole call
    attend_window: computes A·v under the plain window, for the call with its classes folded into
        the batch; a single query is not folded, and comes with the keys of its own class alone
    """
    assert isinstance(pattern.dilation, int)
    dilation, plain = pattern.dilation, pattern.dilated(1)
    if dilation == 1:
        return attend_window(plain, call)
    if call.query_length == 1:  # decoding: the last position sees its own class alone
        own = slice((call.key_length - 1) % dilation, None, dilation)
        return attend_window(plain, _with_distances(call.select(keys=own), dilation))
    fold = Fold.of(dilation, call.query_length, call.key_length)
    folded = call.over(
        fold.queries(call.q), fold.keys(call.k), fold.keys(call.v), fold.key_mask(call)
    )
    folded = _with_distances(folded, dilation)
    return fold.rows(attend_window(plain, folded), call.query_length)


def _with_distances(folded: Call, dilation: int) -> Call:
    """The call of one class or of all, in which a place is `dilation` positions."""
    bias = folded.get(DISTANCE_BIAS.name)
    return folded if bias is None else folded.giving(DISTANCE_BIAS, every(dilation, bias))


def plain_shapes(pattern: Window, shape: Shape) -> list[Shape]:
    """The sizes of the calls with a plain window that `attend` makes, one for each dilation."""
    found: list[Shape] = []
    for dilation, heads in pattern.heads_by_dilation(shape.heads).items():
        kv_heads = kv_heads_of(heads, shape.heads // shape.kv_heads)
        own = replace(shape, heads=len(heads), kv_heads=len(kv_heads))
        if shape.query_length == 1:
            own = replace(own, key_length=-(-shape.key_length // dilation))
        elif dilation > 1:
            own = Fold.of(dilation, shape.query_length, shape.key_length).shape(own)
        found.append(own)
    return found


def count_executed(pattern: Window, shape: Shape, columns: int = 0) -> int:
    """How many (head, query, key) triples of one sample are computed.

    columns: how many keys every row sees beside its window
    """
    plain, total = pattern.dilated(1), 0
    for own in plain_shapes(pattern, shape):
        grid = Grid(own.heads, own.query_length, own.key_length, shape.is_causal)
        pairs = window_plan.count_pairs(plain, grid) + grid.query_length * columns
        total += own.batch_size // shape.batch_size * own.heads * pairs
    return total


def count_support(pattern: Window, grid: Grid, first: int = 0) -> int:
    """How many (head, query, key) triples are visible: query i sees j = i - t · dilation for
    |t| < window where there is such a key, and the sinks (the first keys, which all queries see).

    first: how many tokens at the beginning are global: every query sees them, and they see every
        key
    """
    positions = torch.arange(grid.offset, grid.key_length)
    is_global = (positions >= 0) & (positions < first)
    all_keys = (
        (positions + 1).clamp(min=0)
        if grid.is_causal
        else torch.full_like(positions, grid.key_length)
    )
    everywhere = all_keys.clamp(max=max(first, pattern.sinks))
    total = 0
    for dilation, heads in pattern.heads_by_dilation(grid.heads).items():
        # The largest t; it is negative for a query before the first key.
        farthest = positions.div(dilation, rounding_mode="floor").clamp(max=pattern.window - 1)
        least = 0 if grid.is_causal else 1 - pattern.window
        nearest = (-(grid.key_length - 1 - positions).div(dilation, rounding_mode="floor")).clamp(
            min=least
        )
        nearest_global = ((positions - everywhere).div(dilation, rounding_mode="floor") + 1).clamp(
            min=least
        )
        near, both = ((farthest - low + 1).clamp(min=0) for low in (nearest, nearest_global))
        total += len(heads) * int(torch.where(is_global, all_keys, near + everywhere - both).sum())
    return total
