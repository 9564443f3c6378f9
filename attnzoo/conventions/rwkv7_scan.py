"""RWKV-7's scan as the `rwkv` package computes it, between its projections and its norm."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.conventions.continued import run
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.registry import build


def rwkv7_scan(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`rwkv7` in the spelling of the package's `RWKV_x070_TMix_seq`.

        state = state · diag(w) − (state kk)(kk ∘ a)ᵀ + v kᵀ,    row = state r

    r, k, v: (batch, length, heads, width), receptance, keys and values
    w: the same, above 0 and at most 1: the decay itself, where `rwkv7` takes its logarithm
    kk: the same, removal keys of length 1, as torch's normalize makes them
    a: the same, removal rates
    initial_state: (batch, heads, width of v, width of k), before the first token
    output_final_state: whether the state after the last token is wanted
    key_mask: (batch, length) bool, True = a token, False = padding, which changes no state
    segments: (batch, length) integer, the piece of a packed row that every token belongs to
    returns: rows, as v in float32 at least, and the state in the same dtype, or None
    """
    dtype = accumulation_dtype(r.dtype)
    r, w, k, v, kk, a = (x.transpose(1, 2).to(dtype) for x in (r, w, k, v, kk, a))
    rows, state = run(
        _attention(r.shape[1], r.shape[3]),
        r,
        k,
        v,
        {"log_decay": w.log(), "removal_key": kk, "removal_rate": a},
        initial_state=None if initial_state is None else initial_state.mT,
        output_final_state=output_final_state,
        key_mask=key_mask,
        segments=segments,
    )
    return rows.transpose(1, 2), None if state is None else state.mT


@cache
def _attention(heads: int, width: int) -> Attention:
    return build("rwkv7", heads=heads, head_dim=width)
