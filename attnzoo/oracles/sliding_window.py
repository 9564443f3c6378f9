"""Sliding-window attention, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, oracle, real_keys, softmax_over


@oracle("sliding_window")
def sliding_window(
    q,
    k,
    v,
    *,
    window,
    dilation=1,
    sinks=0,
    sink_logits=None,
    scale=None,
    softcap=None,
    distance_bias=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Beltagy et al. 2020, section 3.1: softmax over the keys at position + t · dilation for |t| <
    window; dilation may differ by head.

    sinks: and the first real keys (Xiao et al. 2023). sink_logits: (heads,), each exponentiated in
    the denominator of every row of its head.
    """
    assert attn_mask is None

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        step = dilation if isinstance(dilation, int) else dilation[h]
        near = torch.zeros_like(visible)
        for i in range(q_h.shape[0]):
            position = k_h.shape[0] - q_h.shape[0] + i
            for t in range(1 - window, window):
                if 0 <= position + t * step < k_h.shape[0]:
                    near[i, position + t * step] = True
            near[i, real_keys(visible)[:sinks]] = True
        return softmax_over(
            visible & near,
            q_h,
            k_h,
            scale,
            softcap=softcap,
            by_distance=None if distance_bias is None else distance_bias[h],
            one_more=None if sink_logits is None else sink_logits[h],
        )

    return by_heads(matrix, q, k, v, key_mask, is_causal)
