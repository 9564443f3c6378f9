"""torch.nn.MultiheadAttention with another core: same parameters, same calls, any attention of the
zoo between the projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_options, check_positive
from attnzoo.attention import LEAF, Attention
from attnzoo.layers.calling import call_layer
from attnzoo.layers.decoding import LayerState, first_state, step_layer
from attnzoo.layers.input_projections import (
    add_own_projection,
    add_projections,
    made_of_hidden_states,
)
from attnzoo.layers.layer import shares_qk
from attnzoo.layers.layer_checks import core_options
from attnzoo.layers.options.output_gate import (
    BONUS,
    GATE_PROJECTION,
    OUTPUT_NORM,
    SKIP,
    add_output,
    check_output,
)
from attnzoo.layers.options.qk_norm import NORMS, add_qk_norm, check_qk_norm
from attnzoo.layers.options.rotary import rotary_of
from attnzoo.layers.options.short_convolution import (
    SHORT_CONVOLUTION,
    add_short_convolution,
    check_short_convolution,
)
from attnzoo.layers.options.token_shift import TOKEN_SHIFT, add_token_shift, check_token_shift
from attnzoo.layers.projections import share_projection
from attnzoo.registry import build, spec_of

#: What options add beside the parameters of torch's module and of the core.
OWN_MODULES = (
    *NORMS,
    SHORT_CONVOLUTION,
    GATE_PROJECTION,
    OUTPUT_NORM,
    SKIP,
    BONUS,
    TOKEN_SHIFT,
)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose core, `self.attention`, is any attention of the zoo.

    Constructor, parameters, initialisation under a seed, `forward` and `state_dict` are torch's;
    with the standard core so are the numbers. It works inside torch's Transformer layers in every
    mode. What differs from torch:

    - A query that sees no key gets 0 before `out_proj`, where torch gives NaN.
    - `is_causal=True` needs no `attn_mask`. With L queries and S keys, query i then sees the keys
      up to S - L + i (bottom-right).
    - Wrong arguments raise ValueError, what the core cannot do raises UnsupportedError; torch
      raises AssertionError.
    - A core's own parameters and buffers (Linformer's projections, Performer's directions) live in
      `state_dict` under `attention.`. A state_dict without any such key, as torch writes it, loads
      with strict=True and leaves them as they are.

    - Inputs along the length that the core's spec declares are projected too, by modules in
      `attention.input_projections`, from query or key. Those that are `like` q, k and v (the global
      tokens of `longformer`: `attention.global_projection`) are projected by one layer, packed as
      `in_proj_weight` is and at first a copy of it, unless kdim or vdim differ; a state_dict of
      torch's fills it with copies of what it holds. What a call brings itself is not projected.
    - A core that shares queries and keys (`reformer` with share_qk=True) gets one projection for
      both: `in_proj_weight` is (2 · embed_dim, embed_dim), of queries and keys and then of values,
      and begins as torch's rows of queries and of values. query and key must be one tensor, kdim
      and vdim embed_dim. A state_dict of torch's, whose queries and keys differ, is refused.

    embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as in torch
    dropout: on the entries of A while training; read here, once
    add_bias_kv, add_zero_attn: append a key to the sequence, so only for softmax over arbitrary
        keys (the standard core)
    attention: a name in `attnzoo.names()`
    attention_options: its further options, e.g. {"num_features": 128}
    qk_norm: queries and keys are divided by their root mean square and weighted by `q_norm` and
        `k_norm`: "per_head" (Qwen3), or "all_heads" as one (OLMo 2)
    rotary: queries and keys are then rotated by position, see `RotaryEmbedding`: True, or
        its options, e.g. {"base": 1e6, "width": 32, "interleaved": True}. Positions count from the
        first real token of a sample, or of a piece of a packed row; query i of L stands at the key
        S - L + i.
    short_convolution: taps of a causal convolution, before these two, of every channel of queries,
        keys and values, and SiLU, see `ShortConvolution`. For causal self-attention alone.
    token_shift: every projection reads, in the place of a token, a mix of it and the one before,
        see `TokenShift`. For causal self-attention alone.
    output_gate: rows are multiplied, before `out_proj`, by what `gate_proj` makes of the query:
        "elementwise", or one number for each head, "headwise"; by its sigmoid, or with output_norm
        by its SiLU; "low_rank": by what two matrices with a sigmoid between them make (RWKV-7)
    output_norm: each head's row is divided by its root mean square and weighted by `out_norm`;
        "all_heads": all heads of a token as one, once they have been gated (Mamba-2); "centered":
        each head's row around its mean, with a bias (RWKV-7)
    skip: a token's own value is added to its row, times a number of each head, `skip` (Mamba-2's D)
    bonus: a token's own value is added to its (normed) row, times Σ q ∘ u ∘ k, `bonus` (RWKV-7)
    raises: ValueError on a malformed option, UnsupportedError on one that the core excludes
        (dropout > 0 among them)
    """

    #: Segments of calls that bring none, see `attnzoo.packed`.
    segments: Tensor | None = None
    qk_norm: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention: str = "standard",
        attention_options: Mapping[str, Any] | None = None,
        qk_norm: Literal["per_head", "all_heads"] | None = None,
        rotary: bool | Mapping[str, Any] = False,
        short_convolution: int | None = None,
        token_shift: bool = False,
        output_gate: Literal["headwise", "elementwise", "low_rank"] | None = None,
        output_norm: bool | Literal["all_heads", "centered"] = False,
        skip: bool = False,
        bonus: bool = False,
    ) -> None:
        if check_positive("embed_dim", embed_dim) % check_positive("num_heads", num_heads):
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        extra_keys, spec = add_bias_kv or add_zero_attn, spec_of(attention)
        given = check_options("attention_options", attention_options)
        options = core_options(spec, dropout, extra_keys, given)
        embedding = rotary_of(embed_dim // num_heads, rotary, extra_keys)
        check_qk_norm(qk_norm)
        check_short_convolution(short_convolution, spec)
        check_token_shift(token_shift, spec)
        check_output(output_gate, output_norm, {SKIP: skip, BONUS: bonus}, extra_keys)
        ends = (add_bias_kv, add_zero_attn, kdim, vdim)
        super().__init__(embed_dim, num_heads, dropout, bias, *ends, batch_first, device, dtype)
        # After torch's own parameters, so that a seed gives those the values that it gives them in
        # torch.
        self._take(
            build(attention, heads=num_heads, head_dim=self.head_dim, **options).to(
                device=device, dtype=dtype
            )
        )
        if shares_qk(self):
            share_projection(self)
        if qk_norm is not None:
            self.qk_norm = qk_norm
            add_qk_norm(self)
        if embedding is not None:
            self.rotary = embedding
        if short_convolution is not None:
            add_short_convolution(self, short_convolution)
        add_output(self, output_gate, output_norm, skip, bonus)
        if token_shift:
            add_token_shift(self, made_of_hidden_states(self))

    def __getstate__(self) -> dict[str, Any]:
        """Without what `attnzoo.packed` has told: a copy is of the model, and not of a call."""
        return {name: x for name, x in self.__dict__.items() if name != "segments"}

    def _take(self, core: Attention) -> None:
        """Let `core` be the core, beside parameters that are there."""
        self.attention = core
        self.__module__ = LEAF
        self.register_forward_pre_hook(is_called)
        add_own_projection(self)
        add_projections(self)

    @staticmethod
    def refuse_core(module: nn.MultiheadAttention, core: Attention) -> None:
        """Raise UnsupportedError where torch's module has what a core excludes (appended keys), as
        the constructor does."""
        core_options(core.spec, 0.0, module.bias_k is not None or module.add_zero_attn, {})

    def _reset_parameters(self) -> None:
        same = self._qkv_same_embed_dim  # it tells torch's drawing which weights there are
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = same
        for name in OWN_MODULES:
            if (module := self._modules.get(name)) is not None:
                module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own, packed = f"{prefix}attention.", state_dict.get(f"{prefix}in_proj_weight")
        if shares_qk(self) and packed is not None and len(packed) == 3 * self.embed_dim:
            raise ValueError(
                f"{prefix}in_proj_weight projects queries and keys apart, and this module has one "
                "projection for both; load it where they are apart"
            )
        if not any(key.startswith(own) for key in state_dict):
            state_dict.update(self.attention.state_dict(prefix=own, keep_vars=True))
            for name in ("weight", "bias"):
                copy, original = (
                    f"{own}{self.attention.own_projection}.{name}",
                    f"{prefix}in_proj_{name}",
                )
                if copy in state_dict and original in state_dict:
                    state_dict[copy] = state_dict[original]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Project, attend, project back. Masks are torch's: True, or -inf in a float mask, hides.

        query: (L, N, embed_dim), or (N, L, embed_dim) if batch_first, or (L, embed_dim)
        key, value: the same with S and kdim, with S and vdim
        key_padding_mask: (N, S) or (S), bool or float (added to the scores)
        attn_mask: (L, S) or (N · num_heads, L, S), bool or float
        need_weights: False spares the L x S matrix, which is what most cores are for
        average_attn_weights: whether that matrix is the mean over the heads
        is_causal: query i sees the keys up to S - L + i
        segments: (N, S) or (S) integer, the piece of a packed row that a token belongs to; None:
            those that `attnzoo.packed` tells the model of
        inputs: what the core takes beside q, k and v, as its spec declares it, which torch has not;
            without the axis of samples where query has none: global_mask, (N, S) or (S), of
            `longformer`
        returns: the output in query's layout and, if need_weights, A: (N, L, S) averaged over heads
            or (N, num_heads, L, S), without N for 2-D inputs. S counts the keys of add_bias_kv and
            add_zero_attn. A is the attention before dropout, where torch returns the dropped one.
        raises: ValueError on tensors that do not fit, UnsupportedError on what the core cannot do

        A core without attn_mask (its spec says so) takes a mask that is causality, padding and
        packing (blocks along the diagonal), or some of these, and runs it as is_causal, padding
        and segments; and a float key_padding_mask of 0 and -inf. Any other mask raises
        UnsupportedError. To tell, the values of a float
        key_padding_mask and of any attn_mask are read (on CUDA: one wait). Where they cannot be, in
        a compiled or traced graph and in torch.func, the hint is_causal=True is required beside
        such a mask and a wrong one fails when the graph runs, or gives NaN where graphs cannot fail
        (torch.jit.trace, ONNX, torch.func). For the other cores, is_causal=True beside a square
        attn_mask adds causality to it; beside another shape the mask alone rules.
        """
        return call_layer(
            self,
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
        return first_state(self, batch_size, max_length)

    def step(
        self,
        x: Tensor,
        state: LayerState,
        key_padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """Attend to the tokens in `state` and to the new ones, causally: rows equal those of one
        `forward` with is_causal=True, and positions go on.

        x: the new tokens, in the layout of `forward`'s query
        state: of `init_state` or of the step before; it stays valid
        key_padding_mask: (N, new_tokens) bool, True hides
        segments, inputs: as in `forward`, of the new tokens
        returns: the new rows in x's layout, and the new state
        raises: ValueError on tensors that do not fit, UnsupportedError on what the core cannot do
        """
        return step_layer(self, x, state, key_padding_mask, segments, inputs)


def is_called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing. torch's encoder layer, in evaluation mode, reads the
    weights of its attention and computes softmax attention itself; where there is a hook it calls
    the module instead, whatever else the module says of itself."""
