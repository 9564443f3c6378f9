"""Which calls kernels for CUDA have been seen to answer right: what runs in `benchmarks/cuda`."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.call import Call


def untried(engine: Any, call: Call) -> str | None:
    """Why backend="auto" does not take FlexAttention and flash-linear-attention for this call yet;
    None where it does: what `benchmarks/cuda/README.md` says has run and was compared with the
    reference there."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    plain = call.key_mask is None and call.segments is None and not call.inputs
    alike = call.q.shape[1:3] == call.k.shape[1:3]
    softcap = getattr(engine, "softcap", None)
    if call.q.dtype == torch.bfloat16 and plain and alike and not learns and softcap is None:
        return None
    return (
        "on a GPU it has been compared with the reference forward, in bfloat16, without masks, "
        "bias and softcap, with as many key heads as heads and as many keys as queries, and for "
        "no other calls yet: ask for it by name"
    )


def never_ran(engine: Any, call: Call) -> str | None:
    """As `untried`, for a backend of which no call has run on a GPU."""
    return "it has not been compared with the reference on a GPU yet: ask for it by name"
