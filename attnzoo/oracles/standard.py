"""Exact attention, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, oracle, softmax_over


@oracle("standard")
def standard(
    q,
    k,
    v,
    *,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    scale=None,
    softcap=None,
    distance_bias=None,
    sink_logits=None,
) -> tuple[Tensor, Tensor]:
    """Vaswani et al. 2017, equation 1. attn_mask: bool (True = attend) or added to the scores.
    softcap, distance_bias (heads, 2 · reach + 1): see `softmax_over`, as in every oracle.
    sink_logits: (heads,), each exponentiated in the denominator of every row of its head."""
    allowed = torch.ones(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        bias = attn_mask.double().expand(allowed.shape)
    samples = []
    for b in range(q.shape[0]):
        mask = None if key_mask is None else key_mask[b : b + 1]

        def matrix(h, q_h, k_h, visible, b=b):
            return softmax_over(
                visible & allowed[b, h],
                q_h,
                k_h,
                scale,
                None if bias is None else bias[b, h],
                softcap=softcap,
                by_distance=None if distance_bias is None else distance_bias[h],
                one_more=None if sink_logits is None else sink_logits[h],
            )

        samples.append(by_heads(matrix, q[b : b + 1], k[b : b + 1], v[b : b + 1], mask, is_causal))
    return torch.cat([out for out, _ in samples]), torch.cat([a for _, a in samples])
