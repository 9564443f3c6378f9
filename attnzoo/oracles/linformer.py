"""Linformer, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, leading_padding, oracle, softmax


@oracle("linformer")
def linformer(
    q,
    k,
    v,
    *,
    key_projection,
    value_projection,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    scale=None,
) -> tuple[Tensor, Tensor]:
    """Wang et al. 2020, equation 7: softmax(scale · q (Eᵀk)ᵀ) Fᵀv with E, F of shape (heads or 1,
    max_length, rank).

    A, row by row, is softmax(scale · q_i (Eᵀk)ᵀ) Fᵀ with the columns of padded keys 0.
    """
    assert not is_causal and attn_mask is None
    n = k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        lead = leading_padding(visible)
        e, f = (
            torch.cat(
                [torch.zeros(lead, x.shape[2]), x[h if x.shape[0] > 1 else 0, : n - lead].double()]
            )
            for x in (key_projection, value_projection)
        )
        projected = sum(
            (torch.outer(e[j], k_h[j]) for j in range(n)),
            torch.zeros(e.shape[1], k_h.shape[1], dtype=torch.float64),
        )
        rows = []
        for i in range(q_h.shape[0]):
            slots = softmax(scale * (projected @ q_h[i]))
            rows.append(torch.where(visible[i], f @ slots, 0.0))
        return torch.stack(rows)

    return by_heads(matrix, q, k, v, key_mask, False)
