"""Engine 1, softmax: A = softmax(scale · q kᵀ + mask), row by row, over every key the masks
allow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from attnzoo.arguments import check_dropout, check_scale
from attnzoo.call import Call, repeat_heads
from attnzoo.eager import is_open, only_autograd_looks
from attnzoo.engines.differentiable import followed
from attnzoo.engines.engine import (
    SOFTMAX_OPERATIONS,
    Backend,
    Cost,
    Engine,
    Shape,
    accumulation_dtype,
    causal_pairs,
    never_refuses,
)
from attnzoo.engines.softmax import xformers_kernel
from attnzoo.engines.softmax.cache import KeyValueCache

LANES = 8  # features of a head come in multiples of so many, for the sake of kernels


class Softmax(Engine):
    """Exact softmax attention. scale: factor of the scores (default 1/sqrt(head_dim)); dropout:
    probability, in training only."""

    def __init__(self, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = check_scale(scale)
        self.dropout = check_dropout(dropout)

    def scale_of(self, q: Tensor) -> float:
        """The factor of the scores of these queries."""
        return int(q.shape[-1]) ** -0.5 if self.scale is None else self.scale

    def matrix(self, call: Call) -> Tensor:
        return dense_weights(self, call, visible(call))

    def init_state(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: Any,
    ) -> KeyValueCache:
        return KeyValueCache.empty(batch_size, kv_heads, head_dim, max_length, None, dtype, device)

    def step(
        self, call: Call, state: KeyValueCache, backend: str
    ) -> tuple[Tensor, KeyValueCache, str]:
        return attend_to_cache(self, call, state, backend)

    def cost(self, shape: Shape) -> Cost:
        pairs = shape.query_length * shape.key_length
        support = causal_pairs(shape.query_length, shape.key_length) if shape.is_causal else pairs
        cost = softmax_cost(shape, shape.heads * pairs, shape.heads * support, None)
        return replace(cost, skipped_macs=cost.macs - cost.support_macs)


def softmax_cost(shape: Shape, pairs: int, support: int, reach: int | None) -> Cost:
    """Cost of a softmax over so many (head, query, key) scores of one sample: those computed, and
    those visible. reach: as a pattern's."""
    per_pair = 2 * shape.batch_size * shape.head_dim
    remembered = shape.key_length if reach is None else min(reach, shape.key_length)
    a_token = 2 * shape.batch_size * shape.kv_heads * shape.head_dim  # numbers of its key and value
    return Cost(
        macs=pairs * per_pair,
        support_macs=support * per_pair,
        elementwise=SOFTMAX_OPERATIONS * shape.batch_size * pairs,
        moved_bytes=shape.input_bytes + shape.query_bytes,
        state_elements=a_token * remembered,
        state_bytes=a_token * remembered * shape.dtype.itemsize,
        state_growth=0
        if reach is not None and shape.key_length >= reach
        else a_token * shape.dtype.itemsize,
    )


def attend_to_cache(
    engine: Engine, call: Call, state: KeyValueCache, backend: str
) -> tuple[Tensor, KeyValueCache, str]:
    """Decode with any engine that reads keys and values: append, then one causal call, aligned
    bottom-right."""
    state = state.append(call)
    out, name = engine(
        Call(call.q, state.k, state.v, state.key_mask, None, True, sink_logits=call.sink_logits),
        backend,
    )
    return out, state, name


def visible(call: Call) -> Tensor | None:
    """The bool part of the masks, broadcastable to (batch, heads, query_length, key_length); None
    when every key is visible to every query."""
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    if call.is_causal:
        mask = _and(mask, causal_mask(call.query_length, call.key_length, call.q.device))
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        mask = _and(mask, call.attn_mask)
    return mask


def causal_mask(query_length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """(query_length, key_length) bool, aligned bottom-right."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)


def _and(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def additive(call: Call) -> Tensor | None:
    """The float part of the masks."""
    return (
        call.attn_mask
        if call.attn_mask is not None and call.attn_mask.is_floating_point()
        else None
    )


def dense_weights(engine: Softmax, call: Call, mask: Tensor | None) -> Tensor:
    """A formed whole under `mask` and the call's additive mask, in the precision of sums."""
    dtype = accumulation_dtype(call.q.dtype)
    q, k = call.q.to(dtype), repeat_heads(call.k, call.group).to(dtype)
    scores = einsum(q, k, "b h i d, b h j d -> b h i j") * engine.scale_of(call.q)
    bias = additive(call)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return masked_softmax(
        scores, None if call.sink_logits is None else call.sink_logits[:, None, None]
    )


def reference(engine: Softmax, call: Call) -> Tensor:
    """A·v by A itself, with dropout, in q's dtype."""
    weights = F.dropout(engine.matrix(call), engine.dropout, engine.training)
    v = repeat_heads(call.v, call.group).to(weights.dtype)
    return einsum(weights, v, "b h i j, b h j d -> b h i d").to(call.q.dtype)


def attend_openly(
    engine: Softmax, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sink_logits: Tensor
) -> Tensor:
    """As `sdpa`, which knows no sink logits, with scores that autograd holds. sink_logits: as in
    `masked_softmax`."""
    dtype = accumulation_dtype(q.dtype)
    scores = (q.to(dtype) @ k.to(dtype).mT) * engine.scale_of(q)
    attention = masked_softmax(scores.masked_fill(~mask, float("-inf")), sink_logits)
    return (F.dropout(attention, engine.dropout, engine.training) @ v.to(dtype)).to(q.dtype)


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


def _sdpa(engine: Softmax, call: Call) -> Tensor:
    mask, bias = _sdpa_masks(call)
    is_causal = bool(call.is_causal and mask is None and call.query_length > 1)
    if call.sink_logits is None:
        return sdpa(engine, call.q, call.k, call.v, mask, bias, is_causal=is_causal)
    q, k, v = _with_sink_slot(call, call.sink_logits, engine.scale_of(call.q), with_query=is_causal)
    mask, bias = (
        None
        if x is None
        else F.pad(x.expand(*x.shape[:-1], call.key_length), (1, 0), value=x.dtype == torch.bool)
        for x in (mask, bias)
    )
    out = sdpa(engine, q, k, v, mask, bias, is_causal=is_causal, scale=engine.scale_of(call.q))
    return out[:, :, int(is_causal) :, : call.v.shape[3]]


def _with_sink_slot(
    call: Call, sink_logits: Tensor, scale: float, *, with_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for an SDPA that knows no sink logits: a slot in front whose score is every row's
    logit and whose value is 0.

    For it q and k get a feature more, and v a column; kernels want as many in all three, and a
    multiple of 8. with_query: the slot has a query too, of zeros, so that torch's causal square
    stays one.
    """
    spare = LANES - call.q.shape[3] % LANES
    logits = (sink_logits.to(accumulation_dtype(call.q.dtype)) / scale).to(call.q.dtype)[
        :, None, None
    ]
    rows = logits.expand(*call.q.shape[:3], 1)
    q = torch.cat([call.q, F.pad(rows, (0, spare - 1))], 3)
    slot = F.pad(call.k.new_ones(*call.k.shape[:2], 1, 1), (call.k.shape[3], spare - 1))
    k = torch.cat([slot, F.pad(call.k, (0, spare))], 2)
    return F.pad(q, (0, 0, int(with_query), 0)), k, F.pad(call.v, (0, spare, 1, 0))


def sdpa(
    engine: Softmax,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    every_row_sees: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's SDPA with the engine's scale and dropout; rows that see no key are 0.

    is_causal is torch's own (square, without masks). every_row_sees: the caller knows that no row
    of `mask` is empty, which spares a pass over the output. scale: instead of the engine's.
    """
    dropout, grouped = engine.dropout if engine.training else 0.0, bool(q.shape[1] != k.shape[1])
    empty = None
    if not every_row_sees and not (mask is None and bias is None):
        mask, empty = merge_masks(mask, bias)
    scale = engine.scale if scale is None else scale
    if (
        is_causal and scale is not None and scale <= 0
    ):  # torch hides the future before it scales: -inf would become inf or NaN
        q, scale = q * scale, 1.0
    kernel = partial(_kernel, dropout=dropout, is_causal=is_causal, scale=scale, grouped=grouped)
    records = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, mask)
    )
    if records and not dropout and only_autograd_looks(q, k, v):
        mask = _additive(mask, q)  # as torch does, so that one mask is held
        out = followed(kernel(q, k, v, mask), kernel, q, k, v, mask)
    else:
        out = kernel(q, k, v, mask)
    return out if empty is None else out.masked_fill(empty, 0.0)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """torch's SDPA, whose kernels have no second derivative; inside `openly` the one that has."""
    if is_open():
        attend = (
            torch.ops.aten._scaled_dot_product_attention_math
        )  # which adds a bool mask as it is
        return attend(
            q, k, v, _additive(mask, q), dropout, is_causal, None, scale=scale, enable_gqa=grouped
        )[0]
    if (
        mask is not None and torch.compiler.is_exporting()
    ):  # ONNX's Attention (opset 23) has no mask that is the same for all queries
        mask = mask.expand(*mask.shape[:-2], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=grouped,
    )


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A bool mask as what is added to scores."""
    return (
        mask
        if mask is None or mask.is_floating_point()
        else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    )


def _sdpa_masks(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Masks that SDPA must be given; its own is_causal serves a plain square call, and one last
    query sees everything."""
    plain = call.key_mask is None and call.attn_mask is None
    if plain and (not call.is_causal or call.query_length in (1, call.key_length)):
        return None, None
    return visible(call), additive(call)


def merge_masks(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One mask for SDPA, and the rows that see no key: those are let see every key (its softmax of
    nothing is NaN on some backends, forward or backward) and must be zeroed in the output."""
    if bias is None:
        assert mask is not None
        empty = ~mask.any(-1, keepdim=True)
        return mask | empty, empty
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    return bias.masked_fill(empty, 0.0), empty


def _sdpa_why_not(engine: Softmax, call: Call) -> str | None:
    if call.sink_logits is not None and engine.scale == 0:
        return "SDPA makes scores of products, and scale=0 leaves none to make sink_logits of"
    if (
        call.attn_mask is not None
        and call.attn_mask.is_floating_point()
        and call.attn_mask.dtype != call.q.dtype
    ):
        return (
            f"SDPA wants an additive attn_mask of q's dtype {call.q.dtype}, got "
            f"{call.attn_mask.dtype}"
        )
    return None


Softmax.backends = (
    Backend("sdpa", _sdpa, _sdpa_why_not),
    Backend("xformers", xformers_kernel.attend, xformers_kernel.why_not),
    Backend("reference", reference, never_refuses),
)
