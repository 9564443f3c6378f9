"""Performer, in float64, from the paper's equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.oracles.linear import kernel
from attnzoo.oracles.matrix import by_heads, final_state, oracle


def random_features(x: Tensor, projection: Tensor, features: str) -> Tensor:
    """Choromanski et al. 2021, Lemma 1 and equation 5: features whose products estimate exp(x·y)
    (`relu`: another kernel).

    x: (..., head_dim); projection: (num_features, head_dim), its rows the draws of omega.
    """
    m = projection.shape[0]
    along = x @ projection.T
    half_norm = (x * x).sum(-1, keepdim=True) / 2
    if features == "positive":
        return (along - half_norm).exp() / math.sqrt(m)
    if features == "hyperbolic":
        return torch.cat([(along - half_norm).exp(), (-along - half_norm).exp()], -1) / math.sqrt(
            2 * m
        )
    if features == "trigonometric":
        return half_norm.exp() * torch.cat([along.sin(), along.cos()], -1) / math.sqrt(m)
    if features == "relu":
        return along.clamp(min=0) / math.sqrt(m)
    raise ValueError(features)


@oracle("performer")
def performer(
    q,
    k,
    v,
    *,
    projection,
    features="positive",
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choromanski et al. 2021: linear attention with random features of q·√scale and k·√scale."""
    assert attn_mask is None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    projection = projection.double()

    def phi(x: Tensor) -> Tensor:
        return random_features(x * math.sqrt(scale), projection, features)

    state = final_state(lambda h, k_h, real: phi(k_h), k, v, key_mask, normalize=True)
    return *by_heads(kernel(phi, phi, True), q, k, v, key_mask, is_causal), state
