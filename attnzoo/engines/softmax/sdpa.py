"""Softmax attention by torch's scaled_dot_product_attention (SDPA).

The masks are merged into the one that SDPA takes, rows that see no key are made 0, and sink logits
become a slot in front of the keys.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.eager import is_open, only_autograd_looks
from attnzoo.engines.differentiable import followed
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.softmax.reference import (
    SoftmaxReference,
    additive,
    masked_softmax,
    visible,
)

LANES = 8  # kernels want heads whose width is a multiple of so many features


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v of any call, sink logits among them."""
    mask, bias = _masks(call)
    # Not one expression: in a graph of symbolic lengths its value would be a symbol too, which SDPA
    # does not take.
    is_causal = False
    if call.is_causal and mask is None and call.query_length > 1:
        is_causal = True
    logits = call.get("sink_logits")
    if logits is None:
        return sdpa(engine, call.q, call.k, call.v, mask, bias, is_causal=is_causal)
    q, k, v = _with_sink_slot(call, logits, engine.scale_of(call.q), with_query=is_causal)
    mask, bias = (
        None
        if x is None
        else F.pad(x.expand(*x.shape[:-1], call.key_length), (1, 0), value=x.dtype == torch.bool)
        for x in (mask, bias)
    )
    out = sdpa(engine, q, k, v, mask, bias, is_causal=is_causal, scale=engine.scale_of(call.q))
    return out[:, :, int(is_causal) :, : call.v.shape[3]]


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    if "sink_logits" in call.inputs and engine.scale == 0:
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


def _masks(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Masks that SDPA must be given; its own is_causal serves a plain square call, and one last
    query sees everything."""
    plain = call.key_mask is None and call.attn_mask is None and call.segments is None
    if plain and (not call.is_causal or call.query_length in (1, call.key_length)):
        return None, None
    return visible(call), additive(call)


def sdpa(
    engine: SoftmaxReference,
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
    dropout, grouped = engine.dropout if engine.training else 0.0, False
    if q.shape[1] != k.shape[1]:
        grouped = True
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


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A bool mask as what is added to scores."""
    return (
        mask
        if mask is None or mask.is_floating_point()
        else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    )


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


def attend_rows(
    engine: SoftmaxReference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    *,
    every_row_sees: bool = False,
) -> Tensor:
    """As `sdpa`; with sink logits, which torch's knows not, in scores that autograd holds.

    sink_logits: broadcastable to (batch, heads, rows, 1), or (heads,).
    """
    if sink_logits is None:
        return sdpa(engine, q, k, v, mask, every_row_sees=every_row_sees)
    if sink_logits.dim() == 1:
        sink_logits = sink_logits[:, None, None]
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    k, v = (repeat_heads(x, group).to(dtype) for x in (k, v))
    scores = (q.to(dtype) @ k.mT) * engine.scale_of(q)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    attention = masked_softmax(scores, sink_logits)
    return (F.dropout(attention, engine.dropout, engine.training) @ v).to(q.dtype)
