"""QK-norm: queries and keys divided by their root mean square, so that scores cannot grow without
bound while training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnzoo.arguments import check_choice
from attnzoo.layers.layer import Layer, shares_qk

#: What is normalised: each head on its own (Qwen3), or all heads as one (OLMo 2).
QK_NORMS = ("per_head", "all_heads")
#: Where the norms of queries and of keys live.
NORMS = ("q_norm", "k_norm")
#: Added to the mean square, as Qwen3 has it; `layer.q_norm.eps` may be set to another.
EPS = 1e-6


def check_qk_norm(value: Any) -> None:
    """Raise a ValueError on what is none of `QK_NORMS` and not None."""
    if value is not None:
        check_choice("qk_norm", value, QK_NORMS)


def add_qk_norm(layer: Any) -> None:
    """Give a layer that has a `qk_norm` the modules `q_norm` and `k_norm`; one that shares queries
    and keys the first alone."""
    like = layer.out_proj.weight
    width = layer.head_dim if layer.qk_norm == "per_head" else layer.embed_dim
    for name in NORMS[: 1 if shares_qk(layer) else 2]:
        setattr(layer, name, nn.RMSNorm(width, EPS, device=like.device, dtype=like.dtype))


def normalised(layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, (batch, heads, length, head_dim), as the layer's norms make them; one tensor stays
    one.

    Source: Henry et al., Query-Key Normalization for Transformers, 2020, arXiv:2010.04245; with a
    root mean square and a weight as in Qwen3 and OLMo 2.
    """
    if layer.qk_norm is None:
        return q, k
    norms = layer._modules
    queries = _normalised(q, norms["q_norm"], layer)
    return queries, queries if q is k else _normalised(k, norms["k_norm"], layer)


def _normalised(x: Tensor, norm: Any, layer: Layer) -> Tensor:
    own = x.to(norm.weight.dtype)  # under autocast, x is less precise
    if layer.qk_norm == "per_head":
        return norm(own).to(x.dtype)
    together = norm(own.transpose(1, 2).flatten(2))
    return together.unflatten(2, x.shape[1::2]).transpose(1, 2).to(x.dtype)
