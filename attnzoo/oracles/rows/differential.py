"""Differential attention, both versions, in float64, from the papers' equations."""

from __future__ import annotations

import math

from torch import Tensor

from attnzoo.oracles.matrix import oracle
from attnzoo.oracles.standard import standard


def two_maps(q, k, v, part, **masks) -> tuple[Tensor, Tensor]:
    """softmax(q¹k¹) - part · softmax(q²k²), of the halves of q and k."""
    half = q.shape[3] // 2
    first = standard(q[..., :half], k[..., :half], v, **masks)
    second = standard(q[..., half:], k[..., half:], v, **masks)
    return first[0] - part * second[0], first[1] - part * second[1]


@oracle("differential")
def differential(
    q,
    k,
    v,
    *,
    lambda_q1,
    lambda_k1,
    lambda_q2,
    lambda_k2,
    layer=0,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Ye et al. 2024, equations 1 to 3. lambda_q1 and the others: (head_dim / 2,)."""
    initial = 0.8 - 0.6 * math.exp(-0.3 * layer)
    part = (lambda_q1.double() @ lambda_k1.double()).exp()
    part = part - (lambda_q2.double() @ lambda_k2.double()).exp() + initial
    masks = {"key_mask": key_mask, "attn_mask": attn_mask, "is_causal": is_causal}
    return two_maps(q, k, v, part, scale=scale, **masks)


@oracle("differential_v2")
def differential_v2(
    q,
    k,
    v,
    *,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    subtraction=None,
) -> tuple[Tensor, Tensor]:
    """Ye et al. 2026: λ of every row. subtraction: (batch, heads, query_length), λ after its
    sigmoid; 1/2 where it is not given."""
    part = 0.5 if subtraction is None else subtraction[..., None].double()
    masks = {"key_mask": key_mask, "attn_mask": attn_mask, "is_causal": is_causal}
    return two_maps(q, k, v, part, scale=scale, **masks)
