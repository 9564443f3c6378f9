"""Multi-head latent attention as a layer, with the calls of torch.nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_options, check_positive, check_scale
from attnzoo.attention import LEAF
from attnzoo.call import UnsupportedError
from attnzoo.eager import is_recorded
from attnzoo.engines.engine import Cost
from attnzoo.layers.calling import call_layer
from attnzoo.layers.decoding import LayerState, first_state, step_layer
from attnzoo.layers.latent.latent_core import Form, LatentCore
from attnzoo.layers.latent.latent_projections import LatentProjections
from attnzoo.layers.layer_checks import core_options
from attnzoo.layers.options.rotary import rotary_of
from attnzoo.registry import build, spec_of
from attnzoo.spec import Spec


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA): the keys and values of all heads are made of one small
    vector a token, and of one rotary key that the heads share; decoding keeps these two alone.

        c_t = RMSNorm(W_dkv x_t);    k_t,h = [k^R_t, W_k,h c_t];    v_t,h = W_v,h c_t

    At DeepSeek-V3's sizes (128 heads, kv_lora_rank=512, qk_rope_head_dim=64) that is 576 numbers a
    token, where a cache of its keys and values would hold 40,960. `forward` expands keys and values
    for as many queries as keys; `step` absorbs W_k into the queries and W_v into the rows where
    that takes fewer multiply-accumulates, as for the few new tokens of decoding: both are equal.

    Calls, masks, `segments` and layouts are those of `attnzoo.MultiheadAttention`; key and value
    must be one tensor.

    embed_dim, num_heads, dropout, batch_first, device, dtype: as in `MultiheadAttention`
    bias: whether the down-projections and `out_proj` have one
    kv_lora_rank: width of the latent c_t; None: four heads, as in the paper
    q_lora_rank: width of a latent of the queries; None: they are projected at once
    qk_nope_head_dim: features of a query and key head without positions; None: embed_dim /
        num_heads
    qk_rope_head_dim: features that are rotated by position, whose keys all heads share; None: half
        as many
    v_head_dim: features of a value head; None: qk_nope_head_dim
    rotary: how they are rotated: True, or options of `RotaryEmbedding` but for its width; False:
        not at all, as in Kimi Linear
    scale: factor of the scores; None: 1/sqrt(qk_nope_head_dim + qk_rope_head_dim). With YaRN
        DeepSeek multiplies that by its mscale squared.
    attention: a name in `attnzoo.names()` whose inputs are q, k and v alone. Only those that are
        softmax over positions (`standard`, `sliding_window`, `bigbird`, ...) absorb; others decode
        with their own state.
    attention_options: its further options
    form: "expanded" or "absorbed" for all calls; "auto": by their lengths
    raises: ValueError on a malformed option, UnsupportedError on one that the core excludes

    In the parameters, the rotated features of a query head come before the others, and of `kv_down`
    before the latent; `attnzoo.latent_layer` takes transformers' layers.

    Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1; DeepSeek-V3, 2024,
    arXiv:2412.19437, section 2.1.1.
    """

    #: Segments of calls that bring none, see `attnzoo.packed`.
    segments: Tensor | None = None
    # What `MultiheadAttention` can have and this layer has not.
    qk_norm = bias_k = bias_v = q_proj_weight = None
    add_zero_attn = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = False,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        rotary: bool | Mapping[str, Any] = True,
        scale: float | None = None,
        attention: str = "standard",
        attention_options: Mapping[str, Any] | None = None,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        self.embed_dim = self.kdim = self.vdim = check_positive("embed_dim", embed_dim)
        self.num_heads = check_positive("num_heads", num_heads)
        self.dropout, self.batch_first = dropout, batch_first
        nope = _width("qk_nope_head_dim", qk_nope_head_dim, max(1, embed_dim // num_heads))
        rope = _width("qk_rope_head_dim", qk_rope_head_dim, nope // 4 * 2 or 2)
        self.head_dim = _width("v_head_dim", v_head_dim, nope)
        rank = _width("kv_lora_rank", kv_lora_rank, 4 * nope)
        if q_lora_rank is not None:
            check_positive("q_lora_rank", q_lora_rank)
        spec = spec_of(attention)
        _check_inputs(spec)
        options = core_options(
            spec, dropout, False, check_options("attention_options", attention_options)
        )
        if spec.exact or scale is not None:
            options = {"scale": check_scale(scale) or (nope + rope) ** -0.5, **options}
        embedding = rotary_of(rope, rotary, False)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latent = LatentProjections(
            embed_dim, num_heads, (rope, nope), rank, q_lora_rank, bias, **factory
        )
        core = build(attention, heads=num_heads, head_dim=rope + nope, **options)
        self.attention = LatentCore(core, rope, rank, self.head_dim, form)
        self.attention.to(**factory)
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias, **factory)
        if embedding is not None:
            self.rotary = embedding
        self.__module__ = LEAF
        self.reset_parameters()

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The first weight that a key meets, which tells the device and dtype of the layer; None
        where a quantised layer stands there."""
        weight: Any = self.latent.kv_down.weight
        return weight if isinstance(weight, Tensor) else None

    def __getstate__(self) -> dict[str, Any]:
        """Without what `attnzoo.packed` has told: a copy is of the model, and not of a call."""
        return {name: x for name, x in self.__dict__.items() if name != "segments"}

    def reset_parameters(self) -> None:
        """Draw all parameters: projections by Xavier's uniform rule, biases 0, norms 1."""
        self.latent.reset_parameters()
        self.attention.core.reset_parameters()
        for module in (self.attention.kv_up, self.out_proj):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `MultiheadAttention.forward`. key, value: one tensor, by default the query."""
        key = query if key is None else key
        value = key if value is None else value
        if value is not key and not is_recorded():  # in a graph one tensor may come in as two
            raise ValueError(
                "key and value must be one tensor, of which latent attention makes both; leave "
                "value out"
            )
        layer: Any = self
        return call_layer(
            layer,
            query,
            key,
            value,
            (key_padding_mask, attn_mask),
            need_weights,
            average_attn_weights,
            is_causal,
            segments,
            inputs,
        )

    def init_state(self, batch_size: int, max_length: int | None = None) -> LayerState:
        """An empty state for `step`. max_length: tokens that it will take; None: any number."""
        layer: Any = self
        return first_state(layer, batch_size, max_length)

    def step(
        self,
        x: Tensor,
        state: LayerState,
        key_padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """As `MultiheadAttention.step`: new tokens, and the state after them."""
        layer: Any = self
        return step_layer(layer, x, state, key_padding_mask, segments, inputs)

    def cost(
        self,
        batch_size: int,
        query_length: int,
        key_length: int | None = None,
        *,
        is_causal: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        """Closed-form cost of one forward without weights, projections included; its arguments are
        those of `Attention.cost`. A step projects its new tokens alone: what it costs beyond that
        is `layer.attention.cost(batch_size, new, kept + new)`."""
        core = self.attention.cost(
            batch_size, query_length, key_length, is_causal=is_causal, dtype=dtype
        )
        of_queries = [self.latent._modules.get("q_down"), self.latent.q_proj, self.out_proj]
        queries = sum(one.weight.numel() for one in of_queries if one is not None)
        made = query_length * queries
        made += (key_length or query_length) * self.latent.kv_down.weight.numel()
        parameters = sum(one.numel() for one in self.parameters())
        more = parameters - core.parameters
        return replace(
            core,
            macs=core.macs + batch_size * made,
            support_macs=core.support_macs + batch_size * made,
            parameters=parameters,
            moved_bytes=core.moved_bytes + more * dtype.itemsize,
        )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _width(name: str, given: int | None, default: int) -> int:
    return check_positive(name, default if given is None else given)


def _check_inputs(spec: Spec) -> None:
    """Raise UnsupportedError on a core that is given more of hidden states than q, k and v."""
    own = [one.name for one in spec.inputs if one.is_projected or one.like is not None]
    if own:
        raise UnsupportedError(
            f"{spec.name} takes {own[0]} of hidden states beside q, k and v, which latent "
            "attention does not make; use MultiheadAttention, or attention='standard'"
        )
