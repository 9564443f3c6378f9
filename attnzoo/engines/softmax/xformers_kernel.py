"""Softmax attention by xformers' memory-efficient kernels (CUDA, optional).

Causality is one of the library's lazy masks, which say what is hidden without a tensor of query
length × key length. This backend has not run on a GPU yet: the choice of mask is tested against its
`.materialize()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.installed import missing
from attnzoo.engines.softmax.reference import SoftmaxReference

LARGEST_HEAD_DIM = 256  # that xformers' FlashAttention operators take


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim), of a call that `why_not` accepts."""
    # xformers wants (batch, length, heads, head_dim), and for gradients equally many heads in all.
    from xformers.ops import memory_efficient_attention

    q, k, v = (
        x.transpose(1, 2)
        for x in (call.q, repeat_heads(call.k, call.group), repeat_heads(call.v, call.group))
    )
    dropout = engine.dropout if engine.training else 0.0
    return memory_efficient_attention(
        q, k, v, attn_bias=choose_bias(call), p=dropout, scale=engine.scale
    ).transpose(1, 2)


def choose_bias(call: Call) -> Any:
    """xformers' mask for a call without padding: None, or a causal mask in which the last query
    stands at the last key."""
    if not call.is_causal or call.query_length == 1:
        return None
    from xformers.ops.fmha import attn_bias

    return (
        attn_bias.LowerTriangularMask()
        if call.offset == 0
        else attn_bias.LowerTriangularFromBottomRightMask()
    )


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it."""
    if call.q.device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it has no {call.q.dtype} kernel: use float16, bfloat16 or float32"
    if call.key_mask is not None or call.attn_mask is not None:
        return "a key_mask or attn_mask would have to be laid out as a dense bias: leave it to sdpa"
    if "sink_logits" in call.inputs or "distance_bias" in call.inputs:
        return "it has no place for sink_logits and distance_bias: leave them to sdpa"
    if engine.softcap is not None:
        return "it has no softcap"
    if call.is_causal and call.offset < 0:
        return (
            f"query_length={call.query_length} is over key_length={call.key_length}: the first "
            "rows see nothing, which it has no mask for"
        )
    for name, width in (("head_dim", call.q.shape[3]), ("value_dim", call.v.shape[3])):
        if width % 8 or width > LARGEST_HEAD_DIM:
            return f"{name}={width} must be a multiple of 8 up to {LARGEST_HEAD_DIM}"
    return missing("xformers", "pip install 'attnzoo[cuda]'") or _no_operator()


def _no_operator() -> str | None:
    """Why no kernel of xformers can run; None when one can. The library can be imported even where
    its kernels were built for another torch."""
    from xformers.ops import fmha

    if fmha.flash.FwOp.is_available() or fmha.cutlass.FwOp.is_available():
        return None
    return (
        "xformers found none of its kernels built for this torch: install the xformers release "
        "that goes with it"
    )


_no_operator._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
