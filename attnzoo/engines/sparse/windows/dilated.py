"""Dilated windows: positions that leave the same residue modulo the dilation form a sequence of
their own, in which the window is plain.

The residue classes are folded into the batch, and whatever attends to plain windows runs on them.
Heads of one dilation go together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, kv_heads_of
from attnzoo.engines.engine import Shape
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows import window_plan

AttendWindow = Callable[[Window, Call], Tensor]  # a window's A·v


@dataclass(frozen=True)
class Fold:
    """How positions become (classes, places): position p is place p // dilation of class p %
    dilation.

    ahead: empty rows before the first query, so that queries begin at a class 0. spare: empty rows
    and slots at the end.
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
        """(batch · dilation, places) bool. Causal, an empty slot at the end needs no mask: no real
        row sees it."""
        mask = call.key_mask
        if mask is None:
            if call.is_causal or not self.spare:
                return None
            mask = torch.ones(
                call.k.shape[0], call.key_length, dtype=torch.bool, device=call.k.device
            )
        return F.pad(mask, (0, self.spare)).unflatten(1, (-1, self.dilation)).mT.flatten(0, 1)

    def rows(self, out: Tensor, query_length: int) -> Tensor:
        """Back again: (batch · dilation, heads, places, d) -> (batch, heads, query_length, d)."""
        whole = out.unflatten(0, (-1, self.dilation)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return whole[:, :, self.ahead : self.ahead + query_length]

    def shape(self, shape: Shape) -> Shape:
        """The sizes of the folded call."""
        queries, keys = self.ahead + shape.query_length + self.spare, shape.key_length + self.spare
        batch_size = shape.batch_size * self.dilation
        return replace(
            shape,
            batch_size=batch_size,
            query_length=queries // self.dilation,
            key_length=keys // self.dilation,
        )


def attend(pattern: Window, call: Call, attend_window: AttendWindow) -> Tensor:
    """A·v for a window of any dilation, by what attends to plain ones."""
    return by_dilation(
        pattern, call, lambda window, part: of_one_dilation(window, part, attend_window)
    )


def by_dilation(pattern: Window, call: Call, attend_heads: AttendWindow) -> Tensor:
    """A·v, the heads of every dilation by themselves: attend_heads takes their window, which has
    one dilation, and their part of the call."""
    groups = pattern.heads_by_dilation(call.q.shape[1])
    if len(groups) == 1:
        (dilation,) = groups
        return attend_heads(replace(pattern, dilation=dilation), call)
    outs = [
        attend_heads(replace(pattern, dilation=dilation), call.select(heads=heads))
        for dilation, heads in groups.items()
    ]
    order = torch.tensor(
        [head for heads in groups.values() for head in heads], device=call.q.device
    )
    return torch.cat(outs, 1).index_select(1, order.argsort())


def of_one_dilation(pattern: Window, call: Call, attend_window: AttendWindow) -> Tensor:
    """A·v for a window of one dilation; attend_window takes the plain window, and the call with its
    residue classes folded into the batch. A single query stays one: its own class is all that it
    sees."""
    assert isinstance(pattern.dilation, int)
    dilation, plain = pattern.dilation, replace(pattern, dilation=1)
    if dilation == 1:
        return attend_window(plain, call)
    if call.query_length == 1:  # decoding: the last position sees its own class alone
        own = slice((call.key_length - 1) % dilation, None, dilation)
        return attend_window(plain, call.select(keys=own))
    fold = Fold.of(dilation, call.query_length, call.key_length)
    folded = call.over(
        fold.queries(call.q), fold.keys(call.k), fold.keys(call.v), fold.key_mask(call)
    )
    return fold.rows(attend_window(plain, folded), call.query_length)


def plain_shapes(pattern: Window, shape: Shape) -> list[Shape]:
    """Sizes of the calls with a plain window that `attend` makes, one for each dilation."""
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
    """(head, query, key) triples of one sample that are computed.

    columns: keys that every row sees beside its window.
    """
    plain, total = replace(pattern, dilation=1), 0
    for own in plain_shapes(pattern, shape):
        grid = Grid(own.heads, own.query_length, own.key_length, shape.is_causal)
        pairs = window_plan.count_pairs(plain, grid) + grid.query_length * columns
        total += own.batch_size // shape.batch_size * own.heads * pairs
    return total


def count_support(pattern: Window, grid: Grid, first: int = 0) -> int:
    """Visible (head, query, key) triples: query i sees j = i - t · dilation for |t| < window where
    there is such a key, and the sinks.
    first: how many keys at the beginning are global, seen by every query and seeing every key."""
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
        farthest = positions.div(dilation, rounding_mode="floor").clamp(
            max=pattern.window - 1
        )  # t; negative ahead of the first key
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
