"""One row of PaTH attention behind a state, whose keys are turned already: to behind the last token
those of the last ones, and farther back the query is turned to where the others are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import SoftmaxReference, additive, masked_softmax
from attnzoo.variants.path.householder import CHUNK, turned_keys


@dataclass(frozen=True, eq=False)
class TurnedKeys:
    """Keys in two parts, as the last query reads them.

    far: the first keys, turned to behind the last of them, (batch, kv_heads, first, width)
    near: the others, turned to behind the last token, (batch, kv_heads, CHUNK, width), and zeros
    count: how many keys are near, fewer than CHUNK
    turn: H_last … H_first of their tokens, (batch, kv_heads, width, width): it turns a query back
        to behind `far`
    """

    far: Tensor
    near: Tensor
    count: int
    turn: Tensor

    @classmethod
    def of(cls, k: Tensor, w: Tensor, beta: Tensor, far: Tensor | None) -> Self:
        """k, w: (batch, kv_heads, length, width), of the tokens behind `far`, which may be none;
        beta: (batch, kv_heads, length)."""
        far, count = k[:, :, :0] if far is None else far, int(k.shape[2])
        if not count:
            return cls._none_near(far)
        if count >= CHUNK:  # the last ones, which may be taken back, stay near
            first = count - CHUNK // 2
            keys, turn = turned_keys(k[:, :, :first], w[:, :, :first], beta[:, :, :first])
            far = torch.cat([far @ turn.mT, keys], 2)
            return cls.of(k[:, :, first:], w[:, :, first:], beta[:, :, first:], far)
        keys, turn = turned_keys(k, w, beta)
        return cls(far, F.pad(keys, (0, 0, 0, CHUNK - count)), count, turn)

    @classmethod
    def _none_near(cls, far: Tensor) -> Self:
        batch_size, kv_heads, _, width = far.shape
        turn = torch.eye(width, dtype=far.dtype, device=far.device)
        turn = turn.expand(batch_size, kv_heads, -1, -1)
        return cls(far, far.new_zeros(batch_size, kv_heads, CHUNK, width), 0, turn)

    def with_token(self, k: Tensor, w: Tensor, beta: Tensor) -> Self:
        """The keys behind one token more, which turns all before it. k, w: (batch, kv_heads, 1,
        width); beta: (batch, kv_heads, 1)."""
        if self.count == CHUNK - 1:
            return self._gathered().with_token(k, w, beta)
        stronger = w * beta[..., None]
        near = torch.addcmul(self.near, self.near @ w.mT, stronger, value=-1)
        near[:, :, self.count] = k[:, :, 0]
        turn = torch.addcmul(self.turn, stronger.mT, w @ self.turn, value=-1)
        return type(self)(self.far, near, self.count + 1, turn)

    def _gathered(self) -> Self:
        """The same keys, all of them far."""
        near = self.near[:, :, : self.count]
        return self._none_near(torch.cat([self.far @ self.turn.mT, near], 2))

    def products(self, q: Tensor) -> Tensor:
        """Of the last query's heads, (batch, kv_heads, group, width), with all keys."""
        near = q @ self.near[:, :, : self.count].mT
        return torch.cat([(q @ self.turn) @ self.far.mT, near], -1) if self.far.shape[2] else near

    def tensors(self) -> list[Tensor]:
        return [self.far, self.near, self.turn]

    def select(self, rows: Tensor) -> Self:
        """Those of these rows of the batch."""
        far, near, turn = (x.index_select(0, rows) for x in self.tensors())
        return type(self)(far, near, self.count, turn)


def attend(engine: SoftmaxReference, call: Call, keys: TurnedKeys) -> Tensor:
    """A·v of one query, (batch, heads, 1, value_dim) in q's dtype, behind keys that are turned.

    call: over all keys, of which the last one is the query's own
    """
    q = call.q.to(keys.near.dtype) * engine.scale_of(call.q)
    products = keys.products(q.flatten(1, 2).unflatten(1, (call.k.shape[1], -1)))
    scores, bias = products.flatten(1, 2)[:, :, None], additive(call)
    scores = scores if bias is None else scores + bias
    if call.key_mask is None:  # a row sees its own key at least
        weights = scores.softmax(-1)
    else:
        weights = masked_softmax(scores.masked_fill(~call.key_mask[:, None, None], -torch.inf))
    found = weights.view_as(products) @ call.v.to(weights.dtype)
    return found.flatten(1, 2)[:, :, None].to(call.q.dtype)
