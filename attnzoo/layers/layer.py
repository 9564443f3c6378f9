"""What a layer around an attention has, as the files of this room read it."""

from __future__ import annotations

from typing import Any, Protocol

from attnzoo.attention import Attention


class Layer(Protocol):
    """What is read of a layer, such as `attnzoo.MultiheadAttention`; torch's module declares most
    of it without a type."""

    attention: Attention
    out_proj: Any
    embed_dim: Any
    kdim: Any
    vdim: Any
    num_heads: Any
    head_dim: Any
    dropout: Any
    batch_first: Any
    training: bool
    segments: Any
    qk_norm: Any
    bias_k: Any
    bias_v: Any
    add_zero_attn: Any
    in_proj_weight: Any
    in_proj_bias: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    _modules: Any
    _qkv_same_embed_dim: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def shares_qk(layer: Layer) -> bool:
    """Whether one projection makes queries and keys."""
    return "qk" in layer.attention.projected
