"""The projections of a layer in the layouts that torch's module, shared queries and keys, and a
process of several have: one packed weight, one layer called for all, or a layer for each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.layers.layer import Layer, shares_qk


def share_projection(layer: Layer) -> None:
    """Let one projection make queries and keys; it begins as that of the queries."""
    if layer.in_proj_weight is None:
        raise UnsupportedError(
            f"kdim={layer.kdim} and vdim={layer.vdim} must be embed_dim={layer.embed_dim}: "
            f"{layer.attention.spec.name} shares queries and keys"
        )
    for name in ("in_proj_weight", "in_proj_bias"):
        packed = getattr(layer, name)
        if packed is not None:
            of_queries, _, of_values = packed.detach().chunk(3)
            setattr(layer, name, nn.Parameter(torch.cat([of_queries, of_values])))
    # as PEFT asks: there are not three projections in one weight
    layer._qkv_same_embed_dim = False


def project(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, pattern: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of (batch, heads, length, head_dim): one matmul for self-attention, two
    when key is value. Of a latent layer k is what its values are made of, too, and v is empty."""
    latent = layer._modules.get("latent")
    if latent is not None:
        return latent(query, key, pattern)
    heads, bias = layer.num_heads, layer.in_proj_bias
    separate = layer._modules.get("projections")
    if separate is not None:
        return project_apart(layer, separate, query, key, value, pattern)
    if layer.in_proj_weight is not None:
        return project_by(layer, layer.in_proj_weight, bias, query, key, value, pattern)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        rearrange(F.linear(x, weight, part), pattern, p=1, h=heads)[0]
        for x, weight, part in zip(
            (query, key, value),
            (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight),
            biases,
            strict=True,
        )
    )
    return q, k, v


def project_apart(
    layer: Layer, projections: nn.Module, query: Tensor, key: Tensor, value: Tensor, pattern: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `project`, by modules one for each: in a process of several, which has the
    projections of its own heads."""
    sources = (query, value) if shares_qk(layer) else (query, key, value)
    made = [
        rearrange(project(x), pattern, p=1, h=layer.num_heads)[0]
        for project, x in zip(projections.children(), sources, strict=True)
    ]
    return made[0], made[-2], made[-1]


def project_together(
    layer: Layer, packed: Any, query: Tensor, key: Tensor, value: Tensor, pattern: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `project`, by one layer for all three, which is called: it may be adapted (LoRA),
    quantised or hooked. Three different inputs are multiplied by their own rows of a plain one,
    lest two thirds of what it makes be thrown away."""
    if not (query is key and key is value) and is_plain(packed):
        return project_by(layer, packed.weight, packed.bias, query, key, value, pattern)
    different = {id(x): x for x in (query, key, value)}
    made = {
        which: rearrange(packed(x), pattern, p=3, h=layer.num_heads)
        for which, x in different.items()
    }
    return made[id(query)][0], made[id(key)][1], made[id(value)][2]


def project_by(
    layer: Layer,
    packed: Tensor,
    bias: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `project`, by packed weights, (3 · size, features), or (2 · size, features) where
    queries and keys are the same."""
    size, heads = packed.shape[0] // len(layer.attention.projected), layer.num_heads

    def split(x: Tensor, start: int, parts: int) -> Tensor:
        rows = slice(start * size, (start + parts) * size)
        return rearrange(
            F.linear(x, packed[rows], None if bias is None else bias[rows]),
            pattern,
            p=parts,
            h=heads,
        )

    if shares_qk(layer):
        qk, v = (
            split(query, 0, 2).unbind(0)
            if query is value
            else (split(x, i, 1)[0] for i, x in enumerate((query, value)))
        )
        return qk, qk, v
    if query is key and key is value:
        q, k, v = split(query, 0, 3).unbind(0)
    elif key is value:
        (q,), (k, v) = split(query, 0, 1).unbind(0), split(key, 1, 2).unbind(0)
    else:
        q, k, v = (split(x, i, 1)[0] for i, x in enumerate((query, key, value)))
    return q, k, v


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is a product with its weight and nothing else."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not any(hooks)


def with_end_keys(layer: Layer, x: Tensor, learned: Tensor | None) -> Tensor:
    """x, (batch, heads, length, head_dim), and behind it the learned slot of add_bias_kv and the
    zero slot of add_zero_attn."""
    shape = (1, layer.num_heads, 1, layer.head_dim)
    ends = [] if learned is None else [learned.to(x.dtype).view(shape)]
    if layer.add_zero_attn:
        ends.append(x.new_zeros(shape))
    return torch.cat([x, *(end.expand(x.shape[0], -1, -1, -1) for end in ends)], 2) if ends else x
