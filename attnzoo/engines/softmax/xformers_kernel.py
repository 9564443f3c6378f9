"""Softmax attention by xformers' memory-efficient kernels (CUDA, optional).

Causality is one of the library's lazy masks, which say what is hidden without a tensor of query
length × key length. The choice of mask is tested against its `.materialize()`; its kernels have not
run here yet, since the one GPU at hand had a torch that xformers was not built for.
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
    from xformers.ops import memory_efficient_attention

    asked = _arguments(engine, call)
    return memory_efficient_attention(*asked.pop("tensors"), **asked).transpose(1, 2)


def _arguments(engine: SoftmaxReference, call: Call) -> dict[str, Any]:
    """What xformers is asked for: `tensors`, q, k and v of (batch, length, heads, head_dim), for
    gradients with equally many heads in all, and the rest by its own names."""
    k, v = (repeat_heads(x, call.group) for x in (call.k, call.v))
    return {
        "tensors": [x.transpose(1, 2) for x in (call.q, k, v)],
        "attn_bias": choose_bias(call),
        "p": engine.dropout if engine.training else 0.0,
        "scale": engine.scale,
    }


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
    if call.inputs:
        return f"it has no place for {' and '.join(call.inputs)}: leave them to sdpa"
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
    if torch.compiler.is_compiling():
        return "it chooses its kernel in Python, which breaks a compiled graph"
    return missing("xformers", "pip install 'attnzoo[cuda]'") or _no_operator(engine, call)


def _no_operator(engine: SoftmaxReference, call: Call) -> str | None:
    """Why xformers has no kernel for the call; None when it has. It can be imported even where its
    kernels were built for another torch, another Python or another GPU."""
    from xformers.ops import fmha
    from xformers.ops.fmha import dispatch

    # One head tells as much as all, and is never copied.
    asked = _arguments(engine, call.select(heads=slice(0, 1)))
    inputs = fmha.Inputs(*asked.pop("tensors"), **asked)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    try:
        dispatch._dispatch_fw(inputs, learns)
        if learns:
            dispatch._dispatch_bw(inputs, None)
    except NotImplementedError as error:
        return _reason(str(error))
    return None


def _reason(error: str) -> str:
    """xformers' refusal, which lists the inputs and then a paragraph for each of its kernels, as
    one sentence."""
    kernels = error.split("is not supported because:")
    found = dict.fromkeys(
        line.strip().replace("`", "")
        for kernel in kernels[1:]
        for line in kernel.splitlines()
        if line.startswith("    ")
    )
    return (
        f"xformers has no kernel for it ({'; '.join(found)}): install the xformers release that "
        "goes with this torch, or use sdpa"
    )
