"""Lightning attention as MiniMax's layers compute it."""

from __future__ import annotations

from torch import Tensor

from attnzoo.conventions.continued import built, run
from attnzoo.engines.engine import accumulation_dtype


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows and state of a head that fades by its own slope at each token, without a scale.

    query, key, value: (batch, heads, length, head_dim)
    slope_rate: (heads, 1, 1), at least 0
    initial_state: (batch, heads, head_dim, head_dim), before the first token
    output_final_state: whether the state after the last token is wanted
    key_mask: (batch, length) bool, True = a token, False = padding, which changes no state
    segments: (batch, length) integer, the piece of a packed row that every token belongs to; the
        state is that of the first piece before, and of the last piece after
    returns: rows, as query, and the state in float32 at least, or None
    """
    dtype = accumulation_dtype(query.dtype)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    rows, state = run(
        built("mamba2", q.shape[1], q.shape[3]),  # `lightning` with slopes of a tensor
        q,
        k,
        v,
        {"log_decay": -slope_rate.to(dtype)[:, 0].expand(q.shape[:3])},
        initial_state=initial_state,
        output_final_state=output_final_state,
        key_mask=key_mask,
        segments=segments,
    )
    return rows.to(query.dtype), state
