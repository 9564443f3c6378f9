"""The Sparse Transformer, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, leading_padding, oracle, softmax_over


@oracle("sparse_transformer")
def sparse_transformer(
    q,
    k,
    v,
    *,
    pattern="strided",
    stride=128,
    expressivity=8,
    factors="merged",
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Child et al. 2019, sections 4.2 and 4.3: softmax over A1, A2 (one a head, in turn), or their
    union."""
    assert attn_mask is None

    def shows(factor: int, i: int, j: int) -> bool:
        if pattern == "strided":
            return (i - stride <= j <= i + stride, (i - j) % stride == 0)[factor]
        return (j // stride == i // stride, j % stride in range(stride - expressivity, stride))[
            factor
        ]

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        n, wanted, lead = (
            k_h.shape[0],
            (0, 1) if factors == "merged" else (h % 2,),
            leading_padding(visible),
        )
        chosen = torch.zeros_like(visible)
        for i in range(q_h.shape[0]):
            slot = n - q_h.shape[0] + i
            # Blocks count from the first real token.
            if pattern == "strided" or n != q_h.shape[0] or not 0 <= slot < lead:
                chosen[i] = torch.tensor(
                    [
                        any(shows(factor, slot - lead, j - lead) for factor in wanted)
                        for j in range(n)
                    ]
                )
        return softmax_over(visible & chosen, q_h, k_h, scale)

    return by_heads(matrix, q, k, v, key_mask, is_causal)
