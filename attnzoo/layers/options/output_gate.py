"""What a layer does to the rows of its attention before it projects them back: a token's own value
added, a norm, the bonus, and a gate that the query opens."""

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

#: What has a gate of its own: a head, or every number of it; or these, made by a low rank.
LOW_RANK = "low_rank"
OUTPUT_GATES = ("headwise", "elementwise", LOW_RANK)
#: Where a layer has the skip, the bonus, the gate's projection and the norm.
SKIP, BONUS, GATE_PROJECTION, OUTPUT_NORM = "skip", "bonus", "gate_proj", "out_norm"
#: The output_norm of all heads as one, and that of each around its mean.
ALL_HEADS, CENTERED = "all_heads", "centered"


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


class Bonus(nn.Module):
    """out + (Σ q ∘ u ∘ k) v of a token's own query, key and value. u is a number of each channel,
    which begins as 0.

    Source: Peng et al., RWKV-7 Goose, 2025, arXiv:2503.14456, section 4.
    """

    def __init__(self, heads: int, width: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, **place))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out, q, k, v: (batch, heads, length, head_dim)"""
        own = (q * self.weight[:, None] * k).sum(-1, keepdim=True)
        return out + (own * v).to(out.dtype)


class LowRankOpening(nn.Sequential):
    """W₂ sigmoid(W₁ x): a gate by an inner width of 5 roots of the features, in steps of 32.

    Source: Peng et al., RWKV-7 Goose, 2025, arXiv:2503.14456, section 4, and its code.
    """

    def __init__(self, features: int, **place: Any) -> None:
        rank = max(32, round(5 * features**0.5 / 32) * 32)
        low = nn.Linear(features, rank, bias=False, **place)
        super().__init__(low, nn.Sigmoid(), nn.Linear(rank, features, bias=False, **place))

    def reset_parameters(self) -> None:
        for linear in self:
            if isinstance(linear, nn.Linear):
                linear.reset_parameters()


class RowNorm(nn.RMSNorm):
    """The norm of each head's rows, of which the attention says what its weight begins with."""

    def __init__(self, width: int, start: float) -> None:
        self.start = start
        super().__init__(width, EPS)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)


class JoinedNorm(nn.RMSNorm):
    """Of all heads of a token as one, behind the gate, as Mamba-2 has it."""


class CenteredNorm(nn.GroupNorm):
    """Of each head's row around its mean, with a weight and a bias for every channel, as RWKV-7 has
    it: (batch, heads, length, head_dim) -> as it was."""

    def __init__(self, heads: int, width: int, **place: Any) -> None:
        super().__init__(heads, heads * width, eps=1e-5 * width, **place)

    def forward(self, input: Tensor) -> Tensor:
        batch, heads, length, width = input.shape
        rows = input.transpose(1, 2).reshape(batch * length, heads * width)
        return super().forward(rows).view(batch, length, heads, width).transpose(1, 2)


def check_output(gate: Any, norm: Any, own: dict[str, Any], extra_keys: bool) -> None:
    """Raise a ValueError on a gate that is none of `OUTPUT_GATES` and not None, on a norm that is
    neither True nor False nor a name of one, and on a skip or a bonus beside appended keys.

    own: skip and bonus, by name
    extra_keys: whether the layer appends keys
    """
    if gate is not None:
        check_choice("output_gate", gate, OUTPUT_GATES)
    if not isinstance(norm, bool) and norm not in (ALL_HEADS, CENTERED):
        raise ValueError(f"output_norm={norm!r} must be True, False, {ALL_HEADS!r} or {CENTERED!r}")
    for name, value in own.items():
        if check_flag(name, value) and extra_keys:
            raise ValueError(
                f"{name}=True adds a token's own value to its row, and add_bias_kv and "
                "add_zero_attn append values of no token; leave these False"
            )


def check_own_value_call(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise UnsupportedError where a query has no value of its own to be added."""
    for name in (SKIP, BONUS):
        if name not in layer._modules or (query is value and (name == SKIP or key is value)):
            continue
        if not is_recorded() or not query.shape == key.shape == value.shape:
            # in a graph one tensor may come in as two
            raise UnsupportedError(
                f"{name}=True adds a token's own value to its row, so queries and values must be "
                "of one sequence: pass one tensor as query and value, or build the layer without it"
            )


def add_output(layer: Any, gate: str | None, norm: bool | str, skip: bool, bonus: bool) -> None:
    """Give a layer the skip, the bonus, the projection of a gate and the norm."""
    like = layer.out_proj.weight
    place = {"device": like.device, "dtype": like.dtype}
    if gate == LOW_RANK:
        setattr(layer, GATE_PROJECTION, LowRankOpening(layer.embed_dim, **place))
    elif gate is not None:
        width = layer.num_heads if gate == "headwise" else layer.embed_dim
        has_bias = layer.out_proj.bias is not None
        setattr(layer, GATE_PROJECTION, nn.Linear(layer.embed_dim, width, has_bias, **place))
    if norm == ALL_HEADS:
        setattr(layer, OUTPUT_NORM, JoinedNorm(layer.embed_dim, EPS, **place))
    elif norm == CENTERED:
        setattr(layer, OUTPUT_NORM, CenteredNorm(layer.num_heads, layer.head_dim, **place))
    elif norm:
        norm_of_rows = RowNorm(layer.head_dim, layer.attention.output_scale).to(**place)
        setattr(layer, OUTPUT_NORM, norm_of_rows)
    if skip:
        setattr(layer, SKIP, Skip(layer.num_heads, **place))
    if bonus:
        setattr(layer, BONUS, Bonus(layer.num_heads, layer.head_dim, **place))


def finished(
    layer: Layer, out: Tensor, own: tuple[Tensor, Tensor, Tensor], query: Tensor, pattern: str
) -> Tensor:
    """The rows of an attention as the layer's skip, norm, bonus and gate leave them.

        RMSNorm(out) ∘ silu(gate),    or without a norm    out ∘ sigmoid(gate)
        RMSNorm(out ∘ silu(gate)),    where the norm is of all heads
        (norm(out) + bonus) ∘ gate,    where the gate is of low rank

    out: (batch, heads, length, head_dim)
    own: queries, keys and values of the same tokens, the values not weighed, as out; read where
        there is a skip or a bonus
    query: what the gate reads, as `project` takes it
    pattern: as `project` takes it
    returns: as out

    Source: with a norm of all heads, Dao and Gu, 2024, arXiv:2405.21060, section 7.1; of each, Yang
    et al., Gated Delta Networks, 2024, arXiv:2412.06464, section 3.4, and Sun et al., RetNet, 2023,
    arXiv:2307.08621, equation 8; without one, Qiu et al., Gated Attention for Large Language
    Models, 2025, arXiv:2505.06708.
    """
    norm, project = layer._modules.get(OUTPUT_NORM), layer._modules.get(GATE_PROJECTION)
    skip, bonus = layer._modules.get(SKIP), layer._modules.get(BONUS)
    dtype = out.dtype
    if skip is not None:
        out = skip(out, own[2])
    if norm is not None:
        out = out.to(norm.weight.dtype)  # under autocast, out is less precise
    joined = isinstance(norm, JoinedNorm)
    if norm is not None and not joined:
        out = norm(out)
    if bonus is not None:
        out = bonus(out, *own)
    if project is not None:
        gate = rearrange(project(query), pattern, p=1, h=layer.num_heads)[0]
        if not isinstance(project, LowRankOpening):
            gate = gate.sigmoid() if norm is None else F.silu(gate)
        out = out * gate
    if joined:
        together = norm(out.transpose(1, 2).flatten(2))
        out = together.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
    return out.to(dtype)
