"""Kimi Delta Attention, in float64, from its recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, recurrent, transposed_times, unit
from attnzoo.oracles.matrix import oracle


@oracle("kda")
def kda(
    q,
    k,
    v,
    *,
    l2_norm=True,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    log_decay=None,
    beta=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kimi Team 2025, equation 1: S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ.
    log_decay: (batch, kv_heads, key_length, head_dim), log α_t; beta: (batch, kv_heads,
    key_length), β_t."""
    assert is_causal and attn_mask is None
    heads = q.shape[1]
    keys = of_heads(k, heads, key_mask)
    q, keys = (unit(q), unit(keys)) if l2_norm else (q, keys)
    ones = torch.ones(k.shape[:3], dtype=torch.float64)
    no_decay = torch.zeros(k.shape, dtype=torch.float64)
    alpha = of_heads(no_decay if log_decay is None else log_decay, heads, key_mask).exp()
    strength = of_heads(ones if beta is None else beta, heads, key_mask)

    def advance(state: Tensor, t: int, value: Tensor) -> Tensor:
        k_t, beta_t = keys[:, :, t], strength[:, :, t, None]
        faded = alpha[:, :, t, :, None] * state
        erased = faded - outer(beta_t * k_t, transposed_times(faded, k_t))
        return erased + outer(beta_t * k_t, value)

    return recurrent(q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale, advance)
