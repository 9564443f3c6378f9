"""What a layer does to the rows of its attention before it projects them back: a token's own value
added, a norm, and a gate that the query opens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.arguments import check_choice, check_flag
from attnzoo.call import UnsupportedError
from attnzoo.eager import is_recorded
from attnzoo.layers.layer import Layer
from attnzoo.layers.options.qk_norm import EPS

#: What has a gate of its own: a head, or every number of it.
OUTPUT_GATES = ("headwise", "elementwise")
#: Where a layer has the skip, the gate's projection and the norm.
SKIP, GATE_PROJECTION, OUTPUT_NORM = "skip", "gate_proj", "out_norm"
#: The output_norm of all heads as one.
ALL_HEADS = "all_heads"


class Skip(nn.Module):
    """out + D ∘ v, a number D of each head, which begins as 1.

    Source: Dao and Gu, Transformers are SSMs, 2024, arXiv:2405.21060, section 7.1 and its code.
    """

    def __init__(self, heads: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, **place))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, out: Tensor, v: Tensor) -> Tensor:
        """out, v: (batch, heads, length, head_dim)"""
        return out + (self.weight[:, None, None] * v).to(out.dtype)


class RowNorm(nn.RMSNorm):
    """The norm of each head's rows, of which the attention says what its weight begins with."""

    def __init__(self, width: int, start: float) -> None:
        self.start = start
        super().__init__(width, EPS)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)


class JoinedNorm(nn.RMSNorm):
    """Of all heads of a token as one, behind the gate, as Mamba-2 has it."""


def check_output(gate: Any, norm: Any, skip: Any, extra_keys: bool) -> None:
    """Raise a ValueError on a gate that is none of `OUTPUT_GATES` and not None, on a norm that is
    neither True nor False nor "all_heads", and on a skip beside appended keys.

    extra_keys: whether the layer appends keys
    """
    if gate is not None:
        check_choice("output_gate", gate, OUTPUT_GATES)
    if not isinstance(norm, bool) and norm != ALL_HEADS:
        raise ValueError(f"output_norm={norm!r} must be True, False or {ALL_HEADS!r}")
    if check_flag("skip", skip) and extra_keys:
        raise ValueError(
            "skip=True adds a token's own value to its row, and add_bias_kv and add_zero_attn "
            "append values of no token; leave these False"
        )


def check_skip_call(layer: Layer, query: Tensor, value: Tensor) -> None:
    """Raise UnsupportedError where a query has no value of its own to be added."""
    if SKIP not in layer._modules or query is value:
        return
    if not is_recorded() or query.shape != value.shape:  # in a graph one tensor may come in as two
        raise UnsupportedError(
            "skip=True adds a token's own value to its row, so queries and values must be of one "
            "sequence: pass one tensor as query and value, or build the layer without it"
        )


def add_output(layer: Any, gate: str | None, norm: bool | str, skip: bool) -> None:
    """Give a layer the skip, the projection of a gate and the norm."""
    like = layer.out_proj.weight
    place = {"device": like.device, "dtype": like.dtype}
    if gate is not None:
        width = layer.num_heads if gate == "headwise" else layer.embed_dim
        has_bias = layer.out_proj.bias is not None
        setattr(layer, GATE_PROJECTION, nn.Linear(layer.embed_dim, width, has_bias, **place))
    if norm == ALL_HEADS:
        setattr(layer, OUTPUT_NORM, JoinedNorm(layer.embed_dim, EPS, **place))
    elif norm:
        norm_of_rows = RowNorm(layer.head_dim, layer.attention.output_scale).to(**place)
        setattr(layer, OUTPUT_NORM, norm_of_rows)
    if skip:
        setattr(layer, SKIP, Skip(layer.num_heads, **place))


def finished(layer: Layer, out: Tensor, v: Tensor, query: Tensor, pattern: str) -> Tensor:
    """The rows of an attention as the layer's skip, norm and gate leave them.

        RMSNorm(out) ∘ silu(gate),    or without a norm    out ∘ sigmoid(gate)
        RMSNorm(out ∘ silu(gate)),    where the norm is of all heads

    out: (batch, heads, length, head_dim)
    v: the values, not weighed, (batch, heads, length, head_dim); read where there is a skip
    query: what the gate reads, as `project` takes it
    pattern: as `project` takes it
    returns: as out

    Source: with a norm of all heads, Dao and Gu, 2024, arXiv:2405.21060, section 7.1; of each, Yang
    et al., Gated Delta Networks, 2024, arXiv:2412.06464, section 3.4, and Sun et al., RetNet, 2023,
    arXiv:2307.08621, equation 8; without one, Qiu et al., Gated Attention for Large Language
    Models, 2025, arXiv:2505.06708.
    """
    norm, project = layer._modules.get(OUTPUT_NORM), layer._modules.get(GATE_PROJECTION)
    skip, dtype = layer._modules.get(SKIP), out.dtype
    if skip is not None:
        out = skip(out, v)
    if norm is not None:
        out = out.to(norm.weight.dtype)  # under autocast, out is less precise
    joined = isinstance(norm, JoinedNorm)
    if norm is not None and not joined:
        out = norm(out)
    if project is not None:
        gate = rearrange(project(query), pattern, p=1, h=layer.num_heads)[0]
        out = out * (gate.sigmoid() if norm is None else F.silu(gate))
    if joined:
        together = norm(out.transpose(1, 2).flatten(2))
        out = together.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
    return out.to(dtype)
