"""A window and, beside it, columns: a few keys that every row sees, wherever it stands.

Rows of a window are computed in parts, each with a slice of consecutive keys. The columns are laid
beside every slice, so that one softmax goes over both; in the slice itself they are hidden, so that
a key counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, KEY_POSITIONS, bias_between
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows import dilated
from attnzoo.sequences.padding import fetched


@dataclass(frozen=True)
class Columns:
    """Keys that every row sees, as far as causality allows.

    k, v: (batch, kv_heads, count, head_dim or value_dim)
    real: (batch, count) bool, False where a sample has fewer than count
    slots: (batch, count), where they stand among the keys of the call
    bias: what their distances add to the scores, (batch or 1, heads, query_length, count); None:
        nothing
    """

    k: Tensor
    v: Tensor
    real: Tensor
    slots: Tensor
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        return self.k.shape[2]

    @classmethod
    def at(cls, call: Call, slots: Tensor, real: Tensor) -> Columns:
        """Some keys of a call as columns.

        slots: (batch, count), where they stand among the call's keys
        real: (batch, count) bool, False where a sample has fewer than count
        """
        k, v = fetched(call.k, slots), fetched(call.v, slots)
        return cls(k, v, real, slots, bias_of_columns(call, slots))

    def in_classes(self, dilation: int, fold: dilated.Fold, places: int) -> Columns:
        """The columns of a call whose positions are folded into the batch, as `dilated.Fold` does:
        positions with the same remainder modulo the dilation form a class.

        Every class gets every column. Its slot becomes the place in the class from which on
        causality must show the column, so that the same rows see it as before.

        dilation: number of classes
        fold: of the call
        places: number of keys of a class
        """
        k, v, real = (x.repeat_interleave(dilation, 0) for x in (self.k, self.v, self.real))
        classes = torch.arange(dilation, device=k.device)[:, None]
        # Position / dilation, rounded up, is looked up: a division would be counted as arithmetic.
        rounded_up = torch.arange(places + 1, device=k.device).repeat_interleave(dilation)
        slots = rounded_up[self.slots[:, None] - classes + dilation - 1].flatten(0, 1)
        bias = self.bias
        if bias is not None:
            bias = fold.queries(bias.expand(len(self.slots), -1, -1, -1))
        return Columns(k, v, real, slots, bias)


def bias_of_columns(call: Call, slots: Tensor) -> Tensor | None:
    """What the distances of some keys add to the scores of a call's rows.

    slots: (batch, count), where the keys stand among the call's

    Returns (batch or 1, heads, query_length, count); None where the call has no distance_bias.
    """
    bias, positions = call.get(DISTANCE_BIAS.name), call.get(KEY_POSITIONS.name)
    if bias is None:
        return None
    keys = slots if positions is None else positions.gather(1, slots)
    rows = torch.arange(call.offset, call.key_length, device=bias.device)
    return bias_between(bias, rows[:, None], keys[:, None]).transpose(0, 1)


AttendColumns = Callable[[SoftmaxReference, Window, Call, Columns], Tensor]


def attend_dilated(
    engine: SoftmaxReference, window: Window, call: Call, columns: Columns, attend: AttendColumns
) -> Tensor:
    """A·v for a window with one dilation for all heads, by a function that takes a plain window.

    engine: gives scale and dropout
    window: its dilation is one number
    call: the whole call; its key_mask hides the columns from the window
    columns: the keys that every row sees besides
    attend: computes A·v under a plain window and columns

    Returns (batch, heads, query_length, value_dim).
    """

    def attend_plain(plain: Window, part: Call) -> Tensor:
        its_columns = columns
        if window.dilation != 1:
            if call.query_length == 1:  # the last position, which sees every column
                its_columns = replace(columns, slots=torch.zeros_like(columns.slots))
            else:
                classes = part.k.shape[0] // call.k.shape[0]
                fold = dilated.Fold.of(classes, call.query_length, call.key_length)
                its_columns = columns.in_classes(classes, fold, part.key_length)
        return attend(engine, plain, part, its_columns)

    return dilated.of_one_dilation(window, call, attend_plain)
