"""Gated delta rules as transformers and flash-linear-attention call them."""

from __future__ import annotations

from torch import Tensor

from attnzoo.conventions.continued import built, run
from attnzoo.engines.engine import accumulation_dtype

#: By the dimensions of g: a number for each head, or one for each channel of the keys too.
VARIANTS = {3: "gated_deltanet", 4: "kda"}


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`gated_deltanet`, or `kda` where g has channels, in the spelling of transformers'
    `torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`, and of FLA's chunk forms.

    query, key: (batch, length, key_heads, width); the scale is 1/sqrt(width)
    value: (batch, length, value_heads, value_dim), value_heads a multiple of key_heads
    g: (batch, length, value_heads), or with channels (batch, length, value_heads, width): natural
        logarithm of what is left of the state, at most 0
    beta: (batch, length, value_heads), from 0 to 2
    initial_state: (batch, value_heads, width, value_dim), before the first token
    output_final_state: whether the state after the last token is wanted
    use_qk_l2norm_in_kernel: whether query and key are divided by their length first
    key_mask: (batch, length) bool, True = a token, False = padding, which changes no state
    segments: (batch, length) integer, the piece of a packed row that every token belongs to; the
        state is that of the first piece before, and of the last piece after
    returns: rows, as value in query's dtype, and the state in float32 at least, or None
    raises: ValueError on a g of other dimensions, and as the variants do
    """
    if g.dim() not in VARIANTS:
        raise ValueError(
            f"g has shape {tuple(g.shape)}; it must be (batch, length, heads), or (batch, length, "
            "heads, width) for a gate by channel"
        )
    dtype = accumulation_dtype(query.dtype)
    q, k, v, log_decay, beta = (x.transpose(1, 2).to(dtype) for x in (query, key, value, g, beta))
    if v.shape[1] > k.shape[1]:  # consecutive value heads share a query and a key
        q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], 1) for x in (q, k))
    attention = built(VARIANTS[g.dim()], q.shape[1], q.shape[3], use_qk_l2norm_in_kernel)
    rows, state = run(
        attention,
        q,
        k,
        v,
        {"log_decay": log_decay, "beta": beta},
        initial_state=initial_state,
        output_final_state=output_final_state,
        key_mask=key_mask,
        segments=segments,
    )
    return rows.transpose(1, 2).to(query.dtype), state
