"""Lightning attention, in float64, from its recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, recurrent
from attnzoo.oracles.matrix import oracle


@oracle("lightning")
def lightning(
    q,
    k,
    v,
    *,
    slopes="minimax",
    layer=0,
    num_layers=1,
    scale=1.0,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Qin et al. 2024, equation 4: kv_t = λ kv_{t-1} + k_t v_tᵀ, o_t = kv_tᵀ q_t, with λ = e^-slope
    as MiniMax-01's modeling file has it, or flash-linear-attention's. A group of query heads has
    the slope of its first."""
    assert is_causal and attn_mask is None
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    rates = []
    for h in range(heads):
        first = h - h % group
        if slopes == "minimax":
            of_layer = 1 - layer / (num_layers - 1 if num_layers > 1 else 1) + 1e-5
            rates.append(0.5 ** (8 / heads * (first + 1)) * of_layer)
        else:
            rates.append((8 / heads * (1 - layer / num_layers)) * first)
    left = (-torch.tensor(rates, dtype=torch.float64)).exp()[:, None, None]
    keys = of_heads(k, heads, key_mask)

    def advance(state: Tensor, t: int, value: Tensor) -> Tensor:
        return left * state + outer(keys[:, :, t], value)

    return recurrent(q, k, v, key_mask, q.shape[3] ** -0.5 if scale is None else scale, advance)
