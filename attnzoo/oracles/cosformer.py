"""cosFormer, in float64, from the paper's equation."""

from __future__ import annotations

import math

from torch import Tensor

from attnzoo.oracles.matrix import by_heads, normalised, oracle, rows


@oracle("cosformer")
def cosformer(
    q, k, v, *, max_length, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Qin et al. 2022, equation 10, term by term."""
    assert attn_mask is None

    def matrix(_: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        def weigh(i: int, seen: Tensor) -> Tensor:
            position = k_h.shape[0] - q_h.shape[0] + i
            near = (math.pi / 2 * (position - seen.double()) / max_length).cos()
            return normalised((k_h[seen].clamp(min=0) @ q_h[i].clamp(min=0)) * near)

        return rows(visible, weigh)

    return by_heads(matrix, q, k, v, key_mask, is_causal)
