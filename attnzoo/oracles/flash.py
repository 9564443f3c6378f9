"""FlashAttention, in float64, from the paper's equation."""

from __future__ import annotations

from torch import Tensor

from attnzoo.oracles.matrix import oracle
from attnzoo.oracles.standard import standard


@oracle("flash")
def flash(
    q, k, v, *, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Dao et al. 2022, theorem 1: the output of standard attention."""
    return standard(
        q, k, v, scale=scale, key_mask=key_mask, attn_mask=attn_mask, is_causal=is_causal
    )
