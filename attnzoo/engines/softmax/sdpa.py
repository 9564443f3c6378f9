"""Softmax attention by torch's scaled_dot_product_attention (SDPA).

The masks are merged into the one that SDPA takes, and rows that see no key are made 0. Sink logits
(one more score of every row, a number for each head, that counts in the row's sum alone) become a
slot in front of the keys, since SDPA has no place for them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import is_learned, is_open, is_recorded, only_autograd_looks
from attnzoo.engines.differentiable import followed
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.softmax.distance_bias import last_query_first
from attnzoo.engines.softmax.reference import (
    SoftmaxReference,
    additive,
    visible,
)

FEW_ROWS = 4  # of which the scores are written out sooner than all keys are copied
LANES = 8  # kernels want heads whose width is a multiple of so many features


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim), of any call that `why_not` accepts, with or
    without sink logits."""
    reversed_bias = last_query_first(call) if call.get("sink_logits") is None else None
    if reversed_bias is not None:
        q = call.q.flip(2)
        return sdpa(engine, q, call.k, call.v, None, reversed_bias, every_row_sees=True).flip(2)
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
    if fills_up(call.q, call.k, call.v):
        return (
            f"SDPA wants one width, and filling up {call.key_length} keys costs more than the "
            f"scores of {call.query_length} queries: leave it to rows"
        )
    return cannot(engine, call)


def cannot(engine: SoftmaxReference, call: Call) -> str | None:
    """Why SDPA does not take the call; None when it does."""
    if "sink_logits" in call.inputs and engine.scale == 0:
        return "SDPA makes scores of products, and scale=0 leaves none to make sink_logits of"
    if engine.softcap is not None:
        return "SDPA has no softcap"
    if "log_decay" in call.inputs and call.q.dtype in (torch.float16, torch.bfloat16):
        return f"it would round the sums of log_decay to {call.q.dtype}"
    for name, x in (("attn_mask", call.attn_mask), ("distance_bias", call.get("distance_bias"))):
        if x is not None and x.is_floating_point() and x.dtype != call.q.dtype:
            return f"SDPA wants an additive {name} of q's dtype {call.q.dtype}, got {x.dtype}"
    return None


def fills_up(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all keys or values would be copied for a few queries."""
    return v.shape[3] != q.shape[3] and q.shape[2] <= FEW_ROWS < k.shape[2]


def _masks(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The bool and the additive mask that SDPA must be given; None where there is none.

    Both are None for a causal call without other masks if it is square, where SDPA's own is_causal
    serves, or has one query, which sees every key.
    """
    given = (call.key_mask, call.attn_mask, call.segments)
    given += (call.get("distance_bias"), call.get("log_decay"))
    plain = all(x is None for x in given)
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
    """torch's SDPA with the engine's scale and dropout, in which a row that sees no key is 0.

    engine: gives scale and dropout
    q: (batch, heads, query_length, head_dim)
    k, v: (batch, kv_heads, key_length, head_dim or value_dim)
    mask: bool, True = attend, broadcastable to (batch, heads, query_length, key_length)
    bias: float, added to the scores, broadcastable to the same shape
    is_causal: torch's own flag, for as many queries as keys and no masks
    every_row_sees: the caller knows that no row is empty, which spares a pass over the output
    scale: the factor of the scores; None: the engine's

    Returns (batch, heads, query_length, value_dim).
    """
    if v.shape[3] != q.shape[3]:  # torch's fused kernels want one width
        width, scale = max(q.shape[3], v.shape[3]), engine.scale_of(q) if scale is None else scale
        q, k, whole = (F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
        masks = {"mask": mask, "bias": bias, "is_causal": is_causal, "scale": scale}
        out = sdpa(engine, q, k, whole, every_row_sees=every_row_sees, **masks)
        return out[..., : v.shape[3]]
    dropout, grouped = engine.dropout if engine.training else 0.0, False
    if q.shape[1] != k.shape[1]:
        grouped = True
    empty = None
    if every_row_sees:
        mask = joined(mask, bias)
    elif not (mask is None and bias is None):
        mask, empty = _as_sdpa_takes(mask, bias, q)
    scale = engine.scale if scale is None else scale
    # torch hides the future before it scales: a scale of 0 or less would make -inf NaN or inf.
    if is_causal and scale is not None and scale <= 0:
        q, scale = q * scale, 1.0
    kernel = partial(_kernel, dropout=dropout, is_causal=is_causal, scale=scale, grouped=grouped)
    records = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, mask)
    )
    if records and not dropout and only_autograd_looks(q, k, v):
        mask = (
            mask if mask is None else additive_mask(mask, q)
        )  # torch would convert it and hold both masks until backward
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
    """torch's SDPA. Its fused kernels have no second derivative; inside `eager.openly`, which asks
    for one, torch's own version in plain operators runs instead."""
    if is_open() or _is_learned_in_transform(mask):
        # This operator would add a bool mask as 0 and 1, hence `additive_mask`.
        attend = torch.ops.aten._scaled_dot_product_attention_math
        return attend(
            q,
            k,
            v,
            mask if mask is None else additive_mask(mask, q),
            dropout,
            is_causal,
            None,
            scale=scale,
            enable_gqa=grouped,
        )[0]
    # ONNX's Attention (opset 23) accepts no mask that has one row for all queries.
    if mask is not None and torch.compiler.is_exporting():
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


def _is_learned_in_transform(mask: Tensor | None) -> bool:
    """Whether a mask asks for a gradient that torch cannot see inside torch.func, so that it would
    choose a kernel that has none."""
    return (
        mask is not None
        and not torch.compiler.is_compiling()
        and torch._C._are_functorch_transforms_active()
        and is_learned(mask)
    )


def merge_masks(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge two masks into one for SDPA, in which no row is empty.

    SDPA's softmax of nothing is NaN on some devices, forward or backward. So a row that sees no key
    is made to see every key here, and the caller must make it 0 in the output.

    mask: bool, True = attend; None only with a bias
    bias: float, added to the scores, or None

    Returns the merged mask, bool or float, and which rows saw no key, (..., rows or 1, 1) bool.
    """
    if bias is None:
        assert mask is not None
        empty = ~mask.any(-1, keepdim=True)
        return mask | empty, empty
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    return bias.masked_fill(empty, 0.0), empty


def joined(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A bool mask and an additive one as one; None where there is neither."""
    if mask is None or bias is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, float("-inf"))


def additive_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A bool mask as one of the dtype of `like` that is added to scores: 0 where visible, -inf
    elsewhere. An additive mask stays as it is."""
    if mask.is_floating_point():
        return mask
    if is_recorded():
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, float("-inf"))
    # 1 - 1/1 and 1 - 1/0: on a CPU a fifth of the time of masked_fill, or of SDPA's own conversion.
    return mask.to(like.dtype).reciprocal_().neg_().add_(1)


def _as_sdpa_takes(
    mask: Tensor | None, bias: Tensor | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """As `merge_masks`; without the second on a CPU, where SDPA itself gives 0 for a row that sees
    no key, forward and backward. A graph may be run elsewhere."""
    if q.device.type != "cpu" or is_recorded():
        return merge_masks(mask, bias)
    whole = joined(mask, bias)
    assert whole is not None
    return additive_mask(whole, q), None


def _with_sink_slot(
    call: Call, sink_logits: Tensor, scale: float, *, with_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a slot in front of the keys whose score is every row's sink logit and whose
    value is 0.

    To hold the logit, q and k get one more feature, and all three are padded to one width, a
    multiple of 8, which the kernels want.

    sink_logits: (heads,)
    scale: the factor of the scores, by which the logits are divided in advance
    with_query: give the slot a query of zeros, too, so that there are as many queries as keys for
        torch's own is_causal
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
