"""Linear attention, in float64, from the paper's equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attnzoo.oracles.matrix import HeadMatrix, by_heads, final_state, normalised, oracle, rows


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": _elu_plus_one,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "identity": lambda x: x,
}


def kernel(
    phi_q: Callable[[Tensor], Tensor], phi_k: Callable[[Tensor], Tensor], normalize: bool
) -> HeadMatrix:
    """A_ij = phi(q_i)·phi(k_j) / Σ_l phi(q_i)·phi(k_l), the sum over the keys that i sees."""

    def matrix(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        queries, keys = phi_q(q), phi_k(k)

        def weigh(i: int, seen: Tensor) -> Tensor:
            products = keys[seen] @ queries[i]
            return normalised(products) if normalize else products

        return rows(visible, weigh)

    return matrix


def _efficient(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Shen et al. 2021, equation 5: softmax over the features of a query, softmax over the keys
    that it sees of each feature."""

    def weigh(i: int, seen: Tensor) -> Tensor:
        weight_of_feature = q[i].softmax(0)
        keys = k[seen]
        share_of_key = (keys - keys.max(0).values.detach()).exp()
        return (share_of_key / share_of_key.sum(0)) @ weight_of_feature

    return rows(visible, weigh)


def _series(normalize: bool, _: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Arora et al. 2024, Based: the exponential of a score by its series, to the second order."""

    def weigh(i: int, seen: Tensor) -> Tensor:
        scores = k[seen] @ q[i] / math.sqrt(q.shape[-1])
        series = 1 + scores + scores * scores / 2
        return normalised(series) if normalize else series

    return rows(visible, weigh)


def _series_features(x: Tensor) -> Tensor:
    """1, x_i and x_i·x_j for i < j, x_i²/√2, of x·d^-¼: their products are the series."""
    d = x.shape[-1]
    x = x * d**-0.25
    pairs = [
        x[..., i] * x[..., j] * (0.5**0.5 if i == j else 1) for i in range(d) for j in range(i, d)
    ]
    return torch.cat([torch.ones_like(x[..., :1]), x, torch.stack(pairs, -1)], -1)


@oracle("linear")
def linear(
    q, k, v, *, feature_map="elu", normalize=True, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor, Tensor]:
    """Katharopoulos et al. 2020, equations 4 and 8; `softmax` is Shen et al. 2021. feature_map: a
    name or a callable."""
    assert attn_mask is None
    if feature_map == "softmax":
        matrix, phi, normalize = _efficient, torch.exp, True
    elif feature_map == "taylor":
        matrix, phi = partial(_series, normalize), _series_features
    else:
        phi = feature_map if callable(feature_map) else FEATURE_MAPS[feature_map]
        matrix = kernel(phi, phi, normalize)
    state = final_state(lambda h, k_h, real: phi(k_h), k, v, key_mask, normalize)
    return *by_heads(matrix, q, k, v, key_mask, is_causal), state
