"""Mamba-2's scan as transformers and mamba-ssm call it."""

from __future__ import annotations

from torch import Tensor

from attnzoo.conventions.continued import built, run
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.exponential import softplus


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`mamba2` in the spelling of transformers' `mamba2_chunk_scan`.

    hidden_states: (batch, length, heads, value_dim), the values
    dt: (batch, length, heads), what values and A are multiplied by once it has its bias, went
        through softplus and was brought between the two of dt_limit
    A: (heads,), below 0
    B, C: (batch, length, groups, width), keys and queries, each for consecutive heads
    D: (heads,), the share of its own value that a row gets on top
    initial_states: (batch, heads, value_dim, width), before the first token
    return_final_states: whether the states after the last token are wanted
    key_mask: (batch, length) bool, True = a token, False = padding, which changes no state
    segments: (batch, length) integer, the piece of a packed row that every token belongs to; the
        state is that of the first piece before, and of the last piece after
    returns: rows, as hidden_states in float32 at least, and the states in the same dtype, or None
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = softplus(dt)
    dtype = accumulation_dtype(hidden_states.dtype)
    dt = dt.clamp(*dt_limit).to(dtype)
    values, heads = hidden_states.to(dtype), hidden_states.shape[2]
    q, k = (x.transpose(1, 2).to(dtype).repeat_interleave(heads // x.shape[2], 1) for x in (C, B))
    rows, state = run(
        built("mamba2", heads, q.shape[3]),
        q,
        k,
        (values * dt[..., None]).transpose(1, 2),
        {"log_decay": (A.to(dtype) * dt).transpose(1, 2)},
        initial_state=None if initial_states is None else initial_states.mT,
        output_final_state=return_final_states,
        key_mask=key_mask,
        segments=segments,
    )
    rows = rows.transpose(1, 2)
    if D is not None:
        rows = rows + D[:, None] * values
    return rows, None if state is None else state.mT
