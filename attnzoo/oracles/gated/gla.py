"""Gated linear attention, in float64, from its recurrence."""

from __future__ import annotations

from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, recurrent
from attnzoo.oracles.matrix import oracle


@oracle("gla")
def gla(
    q, k, v, *, scale=None, key_mask=None, attn_mask=None, is_causal=False, log_decay=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Yang et al. 2023, equation 3: S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t / √d.
    log_decay: (batch, kv_heads, key_length, head_dim), log α_t."""
    assert is_causal and attn_mask is None
    heads = q.shape[1]
    keys = of_heads(k, heads, key_mask)
    alpha = None if log_decay is None else of_heads(log_decay, heads, key_mask).exp()

    def advance(state: Tensor, t: int, value: Tensor) -> Tensor:
        kept = state if alpha is None else alpha[:, :, t, :, None] * state
        return kept + outer(keys[:, :, t], value)

    return recurrent(q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale, advance)
