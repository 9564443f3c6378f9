"""What each contender should compute, for some rows of queries, in float64 and in the plainest
way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (q, k, v, rows, is_causal) -> (batch, heads, rows, head_dim). q, k, v: (batch, heads, length,
#: head_dim) float64; rows: positions, int64.
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
FeatureMap = Callable[[Tensor], Tensor]
# (positions of queries (rows, 1), of keys (1, length)) -> bool, maybe with heads in front.
Visible = Callable[[Tensor, Tensor], Tensor]


def softmax_over(visible: Visible | None = None) -> Formula:
    """Exact softmax attention to the visible keys."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        scores = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
        seen = _seen(rows, k.shape[2], is_causal, visible)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    return rows_of


def within(distance: int) -> Visible:
    """|i - j| <= distance."""
    return lambda query, key: (query - key).abs() <= distance


def kernel(query_features: FeatureMap, key_features: FeatureMap) -> Formula:
    """A_ij = φ(q_i)·ψ(k_j) / Σ_l φ(q_i)·ψ(k_l)."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        products = query_features(q[:, :, rows]) @ key_features(k).mT
        products = products * _seen(rows, k.shape[2], is_causal, None)
        return products / products.sum(-1, keepdim=True) @ v

    return rows_of


def positive_features(directions: Tensor) -> FeatureMap:
    """FAVOR+'s exp(ω·x - |x|²/2) with x scaled by head_dim^(-1/4), without a constant that cancels.
    directions: (features, head_dim)."""

    def features(x: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        return (x @ directions.to(x).mT - x.square().sum(-1, keepdim=True) / 2).exp()

    return features


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return torch.nn.functional.elu(x) + 1


def efficient(scale: float) -> Formula:
    """softmax(q) over features times softmax(k) over the length, and `scale` (Shen et al. 2018,
    equation 5). Not causal."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        return scale * q[:, :, rows].softmax(-1) @ (k.softmax(-2).mT @ v)

    return rows_of


def projected(keys: Tensor, values: Tensor) -> Formula:
    """Linformer: softmax over the mixtures keysᵀ·k of values valuesᵀ·v. keys, values: (length,
    rank)."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        return softmax_over()(q, keys.to(k).mT @ k, values.to(v).mT @ v, rows, False)

    return rows_of


def nystrom(landmarks: int, iterations: int) -> Formula:
    """Nyströmformer (Xiong et al. 2021, equations 13 and 15): segment means, and a pseudo-inverse
    by `iterations` steps."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        scale = q.shape[-1] ** -0.5
        mean_q, mean_k = (x.unflatten(2, (landmarks, -1)).mean(3) for x in (q, k))
        first = (q[:, :, rows] @ mean_k.mT * scale).softmax(-1)
        middle = (mean_q @ mean_k.mT * scale).softmax(-1)
        last = (mean_q @ k.mT * scale).softmax(-1) @ v
        return first @ _pseudo_inverse(middle, iterations) @ last

    return rows_of


def _pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    identity = torch.eye(a.shape[-1], dtype=a.dtype)
    z = a.mT / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


def _seen(rows: Tensor, length: int, is_causal: bool, visible: Visible | None) -> Tensor:
    query, key = rows[:, None], torch.arange(length)[None]
    seen = key <= query if is_causal else torch.ones(len(rows), length, dtype=torch.bool)
    return seen if visible is None else seen & visible(query, key)
