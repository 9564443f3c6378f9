"""Sums of the keys and values of stretches of a cache, for attention that scores blocks by their
means: what is summed once is not read again at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.spec import Input

#: Sums of complete stretches, which a step's call brings beside all keys; a level is a stretch.
KEY_SUMS = Input("key_sums", "batch kv_heads levels width")
VALUE_SUMS = Input("value_sums", "batch kv_heads levels value_width")


@dataclass(frozen=True)
class StretchSums:
    """Of a cache without padding, all of whose stretches begin at a multiple of their size.

    size: tokens of a stretch
    k, v: (batch, kv_heads, stretches, d) float64, of the complete ones; v is None where nobody
        reads it
    """

    size: int
    k: Tensor
    v: Tensor | None

    def of_first(self, tokens: int) -> Self:
        """Of the complete stretches of so many tokens."""
        count = tokens // self.size
        if count >= self.k.shape[2]:
            return self
        return self._of_each(lambda x: x[:, :, :count])

    def select(self, rows: Tensor) -> Self:
        return self._of_each(lambda x: x.index_select(0, rows))

    def _of_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, k=change(self.k), v=None if self.v is None else change(self.v))

    def nbytes(self) -> int:
        return self.k.nbytes + (0 if self.v is None else self.v.nbytes)

    def given(self, call: Call) -> Call:
        """The call with the sums."""
        more = {KEY_SUMS: self.k} if self.v is None else {KEY_SUMS: self.k, VALUE_SUMS: self.v}
        inputs = {**call.inputs, **{one.name: x for one, x in more.items()}}
        return replace(call, inputs=inputs, declared=(*call.declared, *more))


def sums_of(k: Tensor, v: Tensor | None, size: int, before: StretchSums | None) -> StretchSums:
    """Of the complete stretches of so many keys and values, (batch, kv_heads, length, d).

    before: of the first of them, of the same size and kind; None: of none
    """
    first, count = 0 if before is None else before.k.shape[2], k.shape[2] // size
    if before is not None and first == count:
        return before

    def summed(x: Tensor | None, known: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        more = x[:, :, first * size : count * size].unflatten(2, (-1, size))
        more = more.sum(3, dtype=torch.float64)
        return more if known is None else torch.cat([known, more], 2)

    of_keys = summed(k, None if before is None else before.k)
    assert of_keys is not None
    return StretchSums(size, of_keys, summed(v, None if before is None else before.v))
