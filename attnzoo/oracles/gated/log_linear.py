"""Log-linear attention, in float64, from its recurrence over the buckets of a Fenwick tree."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.gated.recurrence import of_heads, outer, transposed_times, unit
from attnzoo.oracles.matrix import oracle


@oracle("log_linear")
def log_linear(
    q,
    k,
    v,
    *,
    base="mamba2",
    scale=1.0,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    log_decay=None,
    beta=None,
    levels=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Guo et al. 2025, section 3.2: token t, from 0, writes to bucket 0, and reads Σ_l λ_t^l S_lᵀ
    q_t. Then its buckets up to that of the lowest bit of t + 1 merge into the next. Every bucket
    goes through the transition of `base`: α_t, or α_t (I - β_t k_t k_tᵀ). Only real tokens count; a
    query on padding reads nothing. levels: (batch, heads, query_length, L), λ. The final state,
    (batch, kv_heads, buckets, head_dim, value_dim), has the bucket of 2^l tokens at l."""
    assert is_causal and attn_mask is None
    batch, heads, query_length, head_dim = q.shape
    length = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    keys, q = of_heads(k, heads, key_mask), q.double()
    if base == "gated_deltanet":
        q, keys = unit(q), unit(keys)
    ones = torch.ones(*k.shape[:3], dtype=torch.float64)
    alpha = of_heads(ones * 0 if log_decay is None else log_decay, heads, key_mask).exp()
    strength = of_heads(ones if beta is None else beta, heads, key_mask)
    value = torch.eye(length, dtype=torch.float64)
    samples, states = [], []
    for b in range(batch):
        rows = [torch.zeros(heads, length, dtype=torch.float64)] * query_length
        buckets: dict[int, Tensor] = {}
        count = 0
        for t in range(length):
            if key_mask is not None and not key_mask[b, t]:
                continue
            k_t, beta_t = keys[b : b + 1, :, t], strength[b : b + 1, :, t, None]
            for level, state in buckets.items():
                if base == "gated_deltanet":
                    state = state - outer(beta_t * k_t, transposed_times(state, k_t))
                buckets[level] = alpha[b : b + 1, :, t, None, None] * state
            buckets[0] = outer(beta_t * k_t, value[t])
            count, query = count + 1, t - length + query_length
            if query >= 0:
                row = torch.zeros(heads, length, dtype=torch.float64)
                for level, state in buckets.items():
                    read = transposed_times(state, q[b : b + 1, :, query])[0]
                    weight = 1.0 if levels is None else levels[b, :, query, level, None]
                    row = row + weight * read
                rows[query] = scale * row
            lowest = (count & -count).bit_length() - 1  # the lowest bit of count that is set
            merged = [buckets.pop(level) for level in range(lowest + 1) if level in buckets]
            buckets[lowest + 1] = torch.stack(merged).sum(0)
        samples.append(torch.stack(rows, 1))
        empty = torch.zeros(1, heads, head_dim, length, dtype=torch.float64)
        left = [buckets.get(1 + bit, empty) for bit in range(length.bit_length())]
        states.append(torch.stack(left, 2))
    a, of_values = torch.stack(samples), of_heads(v, heads, key_mask)
    state = torch.cat(states) @ of_values[:, :, None]
    return a @ of_values, a, state[:, :: heads // k.shape[1]]
