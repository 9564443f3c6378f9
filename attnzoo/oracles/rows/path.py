"""PaTH attention, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import oracle, rows, softmax, visible_keys


@oracle("path")
def path(
    q,
    k,
    v,
    *,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    removal_key=None,
    beta=None,
    log_decay=None,
) -> tuple[Tensor, Tensor]:
    """Yang et al. 2025, equation 2: softmax over j <= i of q_i' H_i ... H_{j+1} k_j / √d plus the
    gates behind j, H_t = I - β_t w_t w_t'. removal_key, w: (batch, kv_heads, key_length, head_dim).
    beta: (batch, kv_heads, key_length), 1 where it is not given. log_decay: (batch, heads,
    key_length). Padding changes nothing."""
    assert is_causal and attn_mask is None
    batch, heads, query_length, width = q.shape
    key_length, group = k.shape[2], heads // k.shape[1]
    factor = width**-0.5 if scale is None else scale
    samples = []
    for b in range(batch):
        real = None if key_mask is None else key_mask[b]
        visible = visible_keys(query_length, key_length, real, True)
        shown = torch.ones(key_length, dtype=torch.bool) if real is None else real
        matrices = []
        for h in range(heads):
            keys = torch.where(shown[:, None], k[b, h // group].double(), 0.0)
            gates = torch.zeros(key_length, dtype=torch.float64)
            if log_decay is not None:
                gates = torch.where(shown, log_decay[b, h].double(), 0.0)
            turned, products = keys[:0], {}  # turned: H_t ... H_{j+1} k_j of every j up to t
            for t in range(key_length):
                if removal_key is not None and shown[t]:
                    w = removal_key[b, h // group, t].double()
                    strength = 1.0 if beta is None else beta[b, h // group, t].double()
                    turned = turned - strength * (turned @ w)[:, None] * w
                turned = torch.cat([turned, keys[t : t + 1]])
                row = t - key_length + query_length
                if row >= 0:
                    products[row] = turned @ q[b, h, row].double()

            def weigh(i: int, seen: Tensor, products=products, gates=gates) -> Tensor:
                position = key_length - query_length + i
                behind = gates[1 : position + 1].flip(0).cumsum(0).flip(0)
                faded = torch.cat([behind, behind.new_zeros(1)])
                return softmax((factor * products[i] + faded)[seen])

            matrices.append(rows(visible, weigh))
        samples.append(torch.stack(matrices))
    a = torch.stack(samples)
    real = torch.ones(batch, key_length, dtype=torch.bool) if key_mask is None else key_mask
    values = torch.where(real[:, None, :, None], v, 0.0).double().repeat_interleave(group, 1)
    return a @ values, a
