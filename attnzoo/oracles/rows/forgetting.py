"""Forgetting attention, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import oracle, rows, softmax, visible_keys


@oracle("forgetting")
def forgetting(
    q, k, v, *, scale=None, key_mask=None, attn_mask=None, is_causal=False, log_decay=None
) -> tuple[Tensor, Tensor]:
    """Lin et al. 2025, equation 4: softmax over j <= i of q_i·k_j / √d + Σ_{j<l<=i} log f_l.
    log_decay: (batch, heads, key_length), log f; 0 in padding."""
    assert is_causal and attn_mask is None
    batch, heads, query_length, width = q.shape
    key_length, group = k.shape[2], heads // k.shape[1]
    factor = width**-0.5 if scale is None else scale
    gates = torch.zeros(batch, heads, key_length) if log_decay is None else log_decay
    samples = []
    for b in range(batch):
        real = None if key_mask is None else key_mask[b]
        visible = visible_keys(query_length, key_length, real, True)
        shown = torch.ones(key_length, dtype=torch.bool) if real is None else real
        matrices = []
        for h in range(heads):
            keys = torch.where(shown[:, None], k[b, h // group].double(), 0.0)
            decays = torch.where(shown, gates[b, h].double(), 0.0)

            def weigh(i: int, seen: Tensor, b=b, h=h, keys=keys, decays=decays) -> Tensor:
                position = key_length - query_length + i
                behind = decays[1 : position + 1].flip(0).cumsum(0).flip(0)  # of keys 0, 1, ...
                faded = torch.cat([behind, behind.new_zeros(1)])[seen]
                return softmax(factor * (keys[seen] @ q[b, h, i].double()) + faded)

            matrices.append(rows(visible, weigh))
        samples.append(torch.stack(matrices))
    a = torch.stack(samples)
    real = torch.ones(batch, key_length, dtype=torch.bool) if key_mask is None else key_mask
    values = torch.where(real[:, None, :, None], v, 0.0).double().repeat_interleave(group, 1)
    return a @ values, a
