"""The softmax engine's reference: A written out, row by row over every key that the masks allow.

    A_ij = exp(s_ij) / Σ_l exp(s_il),    s_ij = cap(scale · q_i·k_j) + bias_ij,    l: visible keys

cap(s) is softcap · tanh(s / softcap), or s where there is no softcap. Every backend must equal it.
Memory is quadratic in the length.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from attnzoo.arguments import check_dropout, check_scale, check_softcap
from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import (
    SOFTCAP_OPERATIONS,
    Backend,
    Cost,
    Engine,
    Shape,
    accumulation_dtype,
    never_refuses,
)
from attnzoo.engines.softmax.decay_bias import decay_bias_of
from attnzoo.engines.softmax.distance_bias import (
    DISTANCE_BIAS,
    KEY_POSITIONS,
    bias_of,
    check_reach,
)
from attnzoo.spec import Input

#: One more score of every row, a number for each head, that counts in the row's sum alone.
SINK_LOGITS = Input("sink_logits", "heads")


class SoftmaxReference(Engine):
    """Softmax attention without a fast backend.

    scale: factor of the scores (default 1/sqrt(head_dim)).
    dropout: probability that an entry of A is dropped, in training only.
    softcap: keeps scores within ±softcap, smoothly (Gemma 2; None: as they are).
    """

    def __init__(
        self, scale: float | None = None, dropout: float = 0.0, *, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.scale = check_scale(scale)
        self.dropout = check_dropout(dropout)
        self.softcap = check_softcap(softcap)

    def scale_of(self, q: Tensor) -> float:
        """The factor of the scores of these queries."""
        return int(q.shape[-1]) ** -0.5 if self.scale is None else self.scale

    def capped(self, scores: Tensor) -> Tensor:
        """The scores kept within ±softcap (Gemma team 2024, section 2)."""
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap

    def weigh_(self, scores: Tensor) -> None:
        """Write A's entries in the place of the scores of whole rows, (..., keys)."""
        torch.softmax(scores, -1, out=scores)

    def through_weights_(self, slopes: Tensor, weights: Tensor) -> None:
        """Write the gradients of the scores in the place of those of A, `slopes`."""
        torch.ops.aten._softmax_backward_data.out(
            slopes, weights, -1, slopes.dtype, grad_input=slopes
        )

    def with_softcap(self, cost: Cost, shape: Shape) -> Cost:
        """A cost whose MACs are those of scores and of their values, with what a softcap takes."""
        if self.softcap is None:
            return cost
        scores = cost.macs // (2 * shape.head_dim)
        return replace(cost, elementwise=cost.elementwise + SOFTCAP_OPERATIONS * scores)

    def farthest(self, call: Call) -> int:
        """How many positions at most a key stands from a query that sees it."""
        return max(call.query_length, call.key_length) - 1

    def choose(self, call: Call, requested: str) -> Backend:
        self._check_reach(call)
        return super().choose(call, requested)

    def weights(self, call: Call) -> Tensor:
        self._check_reach(call)
        return super().weights(call)

    def _check_reach(self, call: Call) -> None:
        """Raise a ValueError on a bias that does not reach all keys. A decoding state that tells
        where its keys stand has seen to it: slots of the call say nothing of that."""
        if DISTANCE_BIAS.name in call.inputs and KEY_POSITIONS.name not in call.inputs:
            check_reach(call, self.farthest(call))

    def matrix(self, call: Call) -> Tensor:
        """A of a call, (batch, heads, query_length, key_length) in the precision of sums."""
        return weights_of(self, call, visible(call))


def reference(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v by A itself, with dropout, in q's dtype."""
    weights = F.dropout(engine.matrix(call), engine.dropout, engine.training)
    v = repeat_heads(call.v, call.group).to(weights.dtype)
    return einsum(weights, v, "b h i j, b h j d -> b h i d").to(call.q.dtype)


def weights_of(engine: SoftmaxReference, call: Call, mask: Tensor | None) -> Tensor:
    """A formed whole under `mask` and the call's additive mask, in the precision of sums."""
    dtype = accumulation_dtype(call.q.dtype)
    q, k = call.q.to(dtype), repeat_heads(call.k, call.group).to(dtype)
    scores = engine.capped(einsum(q, k, "b h i d, b h j d -> b h i j") * engine.scale_of(call.q))
    bias = additive(call)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    logits = call.get("sink_logits")
    return masked_softmax(scores, None if logits is None else logits[:, None, None])


def masked_softmax(scores: Tensor, sink_logits: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension in which a row of -inf gives 0 and no NaN gradient.

    sink_logits: one more score of every row, broadcastable to (..., rows, 1), that counts in its
    sum and weighs nothing.
    """
    if sink_logits is not None:
        one_more = sink_logits.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, one_more], -1).softmax(-1)[..., :-1]
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def visible(call: Call) -> Tensor | None:
    """The bool part of the masks, broadcastable to (batch, heads, query_length, key_length); None
    when every key is visible to every query."""
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    if call.segments is not None:
        of_queries = segments_of_queries(call)
        mask = _and(mask, of_queries[:, None, :, None] == call.segments[:, None, None])
    if call.is_causal and (call.query_length != 1 or call.offset < 0):  # a last query sees all
        mask = _and(mask, causal_mask(call.query_length, call.key_length, call.q.device))
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        mask = _and(mask, call.attn_mask)
    return mask


def segments_of_queries(call: Call) -> Tensor:
    """(batch, query_length): the ids at the queries' positions; any where a query stands before
    every key."""
    assert call.segments is not None
    ahead, behind = max(0, -call.offset), max(0, call.offset)
    return F.pad(call.segments, (ahead, 0))[:, behind:]


def causal_mask(query_length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """(query_length, key_length) bool, aligned bottom-right."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)


def _and(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def additive(call: Call) -> Tensor | None:
    """What is added to the scores, by an attn_mask, by the distances of keys and by gates."""
    mask = call.attn_mask
    of_mask = mask if mask is not None and mask.is_floating_point() else None
    found = [x for x in (of_mask, bias_of(call), decay_bias_of(call)) if x is not None]
    return sum(found[1:], found[0]) if found else None


REFERENCE = Backend("reference", reference, never_refuses)
SoftmaxReference.backends = (REFERENCE,)
