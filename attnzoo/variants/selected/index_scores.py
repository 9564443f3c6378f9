"""The scores by which a light indexer ranks keys, and the inputs that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.engines.engine import Shape
from attnzoo.engines.native.library import in_rows, operators
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.sparse.selected.selection import Placed
from attnzoo.spec import Input

Q_INDEX = Input("q_index", "batch index_heads queries index_width", sized=True)
K_INDEX = Input("k_index", "batch index_key_heads keys index_width", padded=0.0, sized=True)
W_INDEX = Input("w_index", "batch index_heads queries", sized=True)
INPUTS = (Q_INDEX, K_INDEX, W_INDEX)


@dataclass(frozen=True)
class Indexer:
    """Σ_h w_h ReLU(q_h·k) over the heads of an indexer, or without one over the attention's own.

    index_heads: heads of q_index and w_index; None: a call may leave the inputs out
    index_dim: their width
    per_group: whether the heads of every key head choose for themselves, by an equal share of the
        index heads; else all heads share one choice. Without an indexer they always do
    """

    index_heads: int | None
    index_dim: int | None
    per_group: bool

    def checked(self, call: Call) -> Call:
        """The call with NaN in every query whose index input holds a NaN or inf.

        raises: ValueError on index inputs that do not belong together
        """
        given = [one.name for one in INPUTS if one.name in call.inputs]
        if not given and self.index_heads is None:
            return call
        if len(given) < len(INPUTS):
            missing = [one.name for one in INPUTS if one.name not in given]
            raise ValueError(
                f"the call brings {' and '.join(given) or 'no index inputs'} and lacks "
                f"{' and '.join(missing)}; an indexer's q_index, k_index and w_index come together"
            )
        q, k, w = (call.inputs[one.name] for one in INPUTS)
        choosers, key_heads = call.k.shape[1] if self.per_group else 1, k.shape[1]
        fits = key_heads % choosers == 0 or choosers % key_heads == 0
        fits = fits and q.shape[1] % max(key_heads, choosers) == 0 and w.shape[1] == q.shape[1]
        if not fits or k.shape[3] != q.shape[3]:
            raise ValueError(
                f"q_index has shape {tuple(q.shape)}, k_index {tuple(k.shape)} and w_index "
                f"{tuple(w.shape)}; the heads of q_index must be those of w_index and a multiple "
                f"of k_index's and of {choosers}, and their widths one"
            )
        if self.index_heads not in (None, q.shape[1]) or self.index_dim not in (None, q.shape[3]):
            raise ValueError(
                f"q_index has {q.shape[1]} heads of {q.shape[3]}; this attention was built with "
                f"index_heads={self.index_heads} and index_dim={self.index_dim}"
            )
        q, w = q.detach(), w.detach()
        if can_look(q, w) and math.isfinite((q.sum() + w.sum()).item()):
            return call
        bad = ~(q.isfinite().all(3).all(1) & w.isfinite().all(1))
        return replace(call, q=torch.where(bad[:, None, :, None], torch.nan, call.q))

    def scores(
        self,
        placed: Placed,
        rows: slice | Tensor,
        length: int,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Of some queries and the first `length` keys, (batch, choosers, rows, length).

        Products of float32 numbers are exact in float64, so that decoding and any backend select
        what the forward selects.

        rows: a slice, or indices, (rows,)
        """
        choosers = self.choosers(placed.call)
        q, k, w = self.given(placed.call)
        q, k = q[:, :, rows].to(dtype).unflatten(1, (k.shape[1], -1)), k[:, :, :length].to(dtype)
        weights = (
            torch.ones_like(q[..., 0]) if w is None else w[:, :, rows].to(dtype).view_as(q[..., 0])
        )
        # The heads of a query side by side, so that one product sums them.
        q, weights = q.transpose(2, 3), weights.transpose(2, 3)
        products = (q.flatten(2, 3) @ k.mT).relu_().unflatten(2, q.shape[2:4])
        choices = max(1, choosers // k.shape[1])  # of each key head
        weights = weights.unflatten(3, (choices, 1, -1))
        found = (weights @ products.unflatten(3, (choices, -1)))[..., 0, :].transpose(2, 3)
        found = found.flatten(1, 2)
        return found if found.shape[1] == choosers else found.unflatten(1, (choosers, -1)).sum(2)

    def best_of_one(self, placed: Placed, block_size: int, width: int) -> Tensor:
        """The blocks whose best keys have the largest scores for the one query of a call, by the
        compiled operator: (batch, choosers, width), -1 where there are fewer."""
        call = placed.call
        q, k, w = self.given(call)
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        dtype = dtype if w is None else torch.promote_types(dtype, w.dtype)
        q, k = (x.to(dtype) for x in (q, k))
        choice = placed.positions, call.is_causal, self.choosers(call), block_size, width
        return operators().native_best_keys(
            in_rows(q),
            in_rows(k),
            None if w is None else w.to(dtype).contiguous(),
            None if call.key_mask is None else in_rows(call.key_mask),
            *choice,
        )

    def error(self, placed: Placed) -> Tensor:
        """What float32 `scores` are off by at most, (batch, 1, query_length, 1): a bound on the
        rounding of a sum of so many products, by the lengths of queries and keys."""
        q, k, w = self.given(placed.call)
        norms = q.float().norm(dim=3)
        longest = k.float().norm(dim=3).amax(2)
        norms = norms * longest.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None]
        total = (norms if w is None else norms * w.float().abs()).sum(1)
        roundings = q.shape[3] + 2 * q.shape[1] + 8
        return (roundings * torch.finfo(torch.float32).eps * total)[:, None, :, None]

    def given(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, keys and weights of the scores; no weights where the attention's own rank."""
        if Q_INDEX.name not in call.inputs:
            return call.q.detach(), call.k.detach(), None
        q, k, w = (call.inputs[one.name].detach() for one in INPUTS)
        return q, k, w

    def choosers(self, call: Call) -> int:
        """How many sets of keys are chosen for a query."""
        own = Q_INDEX.name not in call.inputs
        return int(call.k.shape[1]) if self.per_group or own else 1

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of all scores."""
        width = (self.index_heads or shape.heads) * (self.index_dim or shape.head_dim)
        width += self.index_heads or shape.heads
        return shape.batch_size * shape.query_length * shape.key_length * width

    def state_elements(self, shape: Shape) -> int:
        """Numbers that decoding keeps for the indexer."""
        if self.index_heads is None:
            return 0
        return shape.batch_size * shape.key_length * (self.index_dim or shape.head_dim)


def with_past(call: Call, state: KeyValueCache) -> tuple[Call, KeyValueCache]:
    """The call over the keys of the state and its own, index keys too, and the state after it.

    raises: ValueError where some tokens have come with index inputs and some without
    """
    held = {K_INDEX.name: call.inputs[K_INDEX.name]} if K_INDEX.name in call.inputs else {}
    if state.seen and bool(held) != bool(state.inputs):
        before, now = ("with", "without") if state.inputs else ("without", "with")
        raise ValueError(
            f"the tokens of the state came {before} q_index, k_index and w_index and these come "
            f"{now}; give them in every step or in none"
        )
    state = state.append(call, held)
    whole: Any = call.over(call.q, state.k, state.v, state.key_mask)
    if held:
        own = {one.name: call.inputs[one.name] for one in (Q_INDEX, W_INDEX)}
        whole = replace(whole, inputs={**own, K_INDEX.name: state.inputs[K_INDEX.name]})
    return whole, state.without_excess()
