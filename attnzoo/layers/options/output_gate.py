"""What a layer does to the rows of its attention before it projects them back: a norm, and a gate
that the query opens."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.arguments import check_choice, check_flag
from attnzoo.layers.layer import Layer
from attnzoo.layers.options.qk_norm import EPS

#: What has a gate of its own: a head, or every number of it.
OUTPUT_GATES = ("headwise", "elementwise")
#: Where a layer has the gate's projection and the norm.
GATE_PROJECTION, OUTPUT_NORM = "gate_proj", "out_norm"


def check_output(gate: Any, norm: Any) -> None:
    """Raise a ValueError on a gate that is none of `OUTPUT_GATES` and not None, and on a norm that
    is neither True nor False."""
    if gate is not None:
        check_choice("output_gate", gate, OUTPUT_GATES)
    check_flag("output_norm", norm)


def add_output(layer: Any, gate: str | None, norm: bool) -> None:
    """Give a layer the projection of a gate and the norm of each head."""
    like = layer.out_proj.weight
    place = {"device": like.device, "dtype": like.dtype}
    if gate is not None:
        width = layer.num_heads if gate == "headwise" else layer.embed_dim
        has_bias = layer.out_proj.bias is not None
        setattr(layer, GATE_PROJECTION, nn.Linear(layer.embed_dim, width, has_bias, **place))
    if norm:
        setattr(layer, OUTPUT_NORM, nn.RMSNorm(layer.head_dim, EPS, **place))


def finished(layer: Layer, out: Tensor, query: Tensor, pattern: str) -> Tensor:
    """The rows of an attention as the layer's norm and gate leave them.

        RMSNorm(out) ∘ silu(gate),    or without a norm    out ∘ sigmoid(gate)

    out: (batch, heads, length, head_dim)
    query: what the gate reads, as `project` takes it
    pattern: as `project` takes it
    returns: as out

    Source: with a norm, Yang et al., Gated Delta Networks, 2024, arXiv:2412.06464, section 3.4, and
    Sun et al., RetNet, 2023, arXiv:2307.08621, equation 8; without one, Qiu et al., Gated Attention
    for Large Language Models, 2025, arXiv:2505.06708.
    """
    norm, project = layer._modules.get(OUTPUT_NORM), layer._modules.get(GATE_PROJECTION)
    dtype = out.dtype
    if norm is not None:
        out = norm(out.to(norm.weight.dtype))  # under autocast, out is less precise
    if project is not None:
        gate = rearrange(project(query), pattern, p=1, h=layer.num_heads)[0]
        out = out * (gate.sigmoid() if norm is None else F.silu(gate))
    return out.to(dtype)
