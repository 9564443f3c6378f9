"""Retention, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, final_state, oracle, rows


@oracle("retention")
def retention(
    q, k, v, *, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sun et al. 2023, equation 5, with a γ for each head of keys; the state is that of equation 6,
    S_n = γ S_{n-1} + k_nᵀ v_n."""
    assert is_causal and attn_mask is None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]

    def gamma_of(shared: int) -> float:
        return 1 - 2.0 ** (-5 - shared)

    def faded(shared: int, k_h: Tensor, real: Tensor) -> Tensor:
        later = real.sum() - real.cumsum(0)  # real tokens behind each one
        return gamma_of(shared) ** later.double()[:, None] * k_h

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        gamma = gamma_of(h // group)

        def weigh(i: int, seen: Tensor) -> Tensor:
            position = k_h.shape[0] - q_h.shape[0] + i
            # Real tokens: padding does not fade.
            since = torch.stack([visible[-1, j + 1 : position + 1].sum() for j in seen.tolist()])
            return scale * (k_h[seen] @ q_h[i]) * gamma ** since.double()

        return rows(visible, weigh)

    return *by_heads(matrix, q, k, v, key_mask, True), final_state(faded, k, v, key_mask)
