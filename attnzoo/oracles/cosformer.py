"""cosFormer, in float64, from the paper's equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, final_state, normalised, oracle, rows


@oracle("cosformer")
def cosformer(
    q, k, v, *, max_length, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor, Tensor]:
    """Qin et al. 2022, equation 10, term by term. The features of its state are
    relu(k_j) times cos of π/2 · j/M, and then times sin."""
    assert attn_mask is None

    def phi(_: int, k_h: Tensor, real: Tensor) -> Tensor:
        angles = math.pi / 2 * torch.arange(len(k_h), dtype=torch.float64)[:, None] / max_length
        keys = k_h.clamp(min=0)
        return torch.cat([keys * angles.cos(), keys * angles.sin()], 1)

    def matrix(_: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        def weigh(i: int, seen: Tensor) -> Tensor:
            position = k_h.shape[0] - q_h.shape[0] + i
            near = (math.pi / 2 * (position - seen.double()) / max_length).cos()
            return normalised((k_h[seen].clamp(min=0) @ q_h[i].clamp(min=0)) * near)

        return rows(visible, weigh)

    state = final_state(phi, k, v, key_mask, normalize=True)
    return *by_heads(matrix, q, k, v, key_mask, is_causal), state
