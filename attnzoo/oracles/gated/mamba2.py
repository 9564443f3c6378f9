"""Mamba-2's state space duality, in float64, from its recurrence."""

from __future__ import annotations

from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, recurrent
from attnzoo.oracles.matrix import oracle


@oracle("mamba2")
def mamba2(
    q, k, v, *, scale=1.0, key_mask=None, attn_mask=None, is_causal=False, log_decay=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Dao and Gu 2024, equation 1, A a number: h_t = a_t h_{t-1} + B_t x_tᵀ, y_t = h_tᵀ C_t.
    q, k, v are C, B and x; log_decay: (batch, kv_heads, key_length), log a_t."""
    assert is_causal and attn_mask is None
    heads = q.shape[1]
    keys = of_heads(k, heads, key_mask)
    decay = None if log_decay is None else of_heads(log_decay, heads, key_mask).exp()

    def advance(state: Tensor, t: int, value: Tensor) -> Tensor:
        kept = state if decay is None else decay[:, :, t, None, None] * state
        return kept + outer(keys[:, :, t], value)

    return recurrent(q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale, advance)
