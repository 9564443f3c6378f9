"""DeltaNet, in float64, from its recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, recurrent, transposed_times, unit
from attnzoo.oracles.matrix import oracle


@oracle("deltanet")
def deltanet(
    q,
    k,
    v,
    *,
    l2_norm=True,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    beta=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Schlag et al. 2021, equation 24: what stood at a key, v̄_t = S_{t-1}ᵀ k_t, is replaced by
    β_t v_t + (1 - β_t) v̄_t. beta: (batch, kv_heads, key_length), β_t."""
    assert is_causal and attn_mask is None
    heads = q.shape[1]
    keys = of_heads(k, heads, key_mask)
    q, keys = (unit(q), unit(keys)) if l2_norm else (q, keys)
    given = torch.ones(k.shape[:3], dtype=torch.float64) if beta is None else beta
    strength = of_heads(given, heads, key_mask)

    def advance(state: Tensor, t: int, value: Tensor) -> Tensor:
        k_t, beta_t = keys[:, :, t], strength[:, :, t, None]
        old = transposed_times(state, k_t)
        new = beta_t * value + (1 - beta_t) * old
        return state - outer(k_t, old) + outer(k_t, new)

    return recurrent(q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale, advance)
