"""Nyströmformer, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, oracle, softmax


@oracle("nystromformer")
def nystromformer(
    q,
    k,
    v,
    *,
    num_landmarks=64,
    iterations=6,
    convolution_weight=None,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Xiong et al. 2021, equations 13 and 14, over the real tokens alone; convolution_weight:
    (heads, 1, size, 1), added as a band of A."""
    assert not is_causal and attn_mask is None and q.shape[2] == k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        n = k_h.shape[0]
        real = visible[0].nonzero().squeeze(1).tolist()
        a = torch.zeros(n, n, dtype=torch.float64)
        if real:
            members: dict[int, list[int]] = {}
            for rank, token in enumerate(real):
                members.setdefault(rank * num_landmarks // len(real), []).append(token)
            q_landmarks = torch.stack([q_h[some].mean(0) for some in members.values()])
            k_landmarks = torch.stack([k_h[some].mean(0) for some in members.values()])
            front = torch.stack([softmax(scale * (k_landmarks @ row)) for row in q_h])
            kernel = torch.stack([softmax(scale * (k_landmarks @ row)) for row in q_landmarks])
            back = torch.stack([softmax(scale * (k_h[real] @ row)) for row in q_landmarks])
            inverse = kernel.T / (kernel.sum(0).max() * kernel.sum(1).max())
            one = torch.eye(len(members), dtype=torch.float64)
            for _ in range(iterations):
                az = kernel @ inverse
                inverse = inverse @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
            a = a.index_copy(1, torch.tensor(real), front @ inverse @ back)
        if convolution_weight is not None:
            size = convolution_weight.shape[2]
            band = torch.zeros(n, n, dtype=torch.float64)
            for i in range(n):
                for place in range(size):
                    j = i + place - size // 2
                    if 0 <= j < n and bool(visible[0, j]):
                        band[i, j] = 1.0
            weights = torch.stack(
                [
                    convolution_weight[h, 0, :, 0].double()[
                        (torch.arange(n) - i + size // 2).clamp(0, size - 1)
                    ]
                    for i in range(n)
                ]
            )
            a = a + band * weights
        return a

    return by_heads(matrix, q, k, v, key_mask, False)
