"""RWKV-7's time mixing, in float64, from its recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, recurrent, unit
from attnzoo.oracles.matrix import oracle


@oracle("rwkv7")
def rwkv7(
    q,
    k,
    v,
    *,
    scale=1.0,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    log_decay=None,
    removal_key=None,
    removal_rate=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Peng et al. 2025, equation 17, in the state of this library, (head_dim, value_dim):
    S_t = (diag(w_t) - (a_t ∘ κ_t) κ_tᵀ) S_{t-1} + k_t v_tᵀ. log_decay, removal_key, removal_rate:
    (batch, kv_heads, key_length, head_dim), log w_t, κ_t and a_t."""
    assert is_causal and attn_mask is None
    heads = q.shape[1]
    keys = of_heads(k, heads, key_mask)
    zeros = torch.zeros(k.shape, dtype=torch.float64)
    w = of_heads(zeros if log_decay is None else log_decay, heads, key_mask).exp()
    kappa = unit(keys) if removal_key is None else of_heads(removal_key, heads, key_mask)
    a = of_heads(zeros + 1 if removal_rate is None else removal_rate, heads, key_mask)

    def advance(state: Tensor, t: int, value: Tensor) -> Tensor:
        c = kappa[:, :, t]
        transition = w[:, :, t].diag_embed() - outer(a[:, :, t] * c, c)
        return transition @ state + outer(keys[:, :, t], value)

    return recurrent(q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale, advance)
