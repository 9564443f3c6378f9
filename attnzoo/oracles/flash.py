"""FlashAttention, in float64, from the paper's equation."""

from __future__ import annotations

from torch import Tensor

from attnzoo.oracles.matrix import oracle
from attnzoo.oracles.standard import standard


@oracle("flash")
def flash(
    q,
    k,
    v,
    *,
    scale=None,
    softcap=None,
    distance_bias=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, ...]:
    """Dao et al. 2022, theorem 1: the output of standard attention."""
    given = {"scale": scale, "softcap": softcap, "distance_bias": distance_bias}
    masks = {"key_mask": key_mask, "attn_mask": attn_mask, "is_causal": is_causal}
    return standard(q, k, v, **given, **masks)
