"""Softmax attention of packed rows by torch's kernel for pieces of any length (CUDA): no cutting,
no padding, and no mask. It has not run on a GPU yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.eager import is_recorded
from attnzoo.engines.softmax.reference import SoftmaxReference

LARGEST_HEAD_DIM = 256  # that FlashAttention takes


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, length, value_dim), of a call that `why_not` accepts. Each piece of a
    packed row, and each sample of another call, is a piece of the kernel's."""
    kernel = _kernel()
    assert kernel is not None
    k, v = (repeat_heads(x, call.group) for x in (call.k, call.v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (call.q, k, v))
    ends, longest = boundaries(call)
    side = (-1, 0) if call.is_causal else (-1, -1)
    out = kernel(
        q, k, v, ends, ends, longest, longest, scale=engine.scale_of(call.q), window_size=side
    )
    return out.unflatten(0, (call.q.shape[0], -1)).transpose(1, 2)


def boundaries(call: Call) -> tuple[Tensor, int]:
    """Where pieces begin and the last one ends among the tokens of all samples, (pieces + 1,)
    int32, and the length of the longest."""
    batch_size, length = call.q.shape[0], call.query_length
    begins = torch.zeros(batch_size, length, dtype=torch.bool, device=call.q.device)
    begins[:, 0] = True
    if call.segments is not None:
        begins[:, 1:] = call.segments[:, 1:] != call.segments[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    ends = F.pad(starts, (0, 1), value=batch_size * length)
    return ends.int(), int(ends.diff().max())


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    if call.q.device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"it has no {call.q.dtype} kernel: use float16 or bfloat16"
    if call.key_mask is not None or call.attn_mask is not None:
        return "it takes pieces and no masks: leave a key_mask or attn_mask to sdpa"
    if call.inputs or engine.softcap is not None:
        return "it has no place for sink_logits, distance_bias and a softcap: leave them to sdpa"
    if engine.training and engine.dropout:
        return "it drops no entries of A while training: leave dropout to sdpa"
    if call.query_length != call.key_length:
        return f"it needs as many queries as keys, got {call.query_length} and {call.key_length}"
    width = call.q.shape[3]
    if call.v.shape[3] != width or width % 8 or width > LARGEST_HEAD_DIM:
        return (
            f"head_dim={width} and value_dim={call.v.shape[3]} must be one multiple of 8 up to "
            f"{LARGEST_HEAD_DIM}"
        )
    if is_recorded():
        return "it reads where pieces begin, which a graph cannot"
    if _kernel() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with windows"
    return None


def _kernel() -> Callable[..., Any] | None:
    """torch's function; None where this torch has none that takes the side of causality."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None
