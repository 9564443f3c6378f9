"""Sigmoid attention, in float64, from the paper's equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, of_distance, oracle, rows


@oracle("sigmoid")
def sigmoid(
    q,
    k,
    v,
    *,
    bias=None,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    distance_bias=None,
) -> tuple[Tensor, Tensor]:
    """Ramapuram et al. 2024, equation 3: σ(q_i·k_j / √d + b), b = -log n, n the keys that the row
    sees; a number is b itself. attn_mask: bool (True = attend) or added to the scores, -inf of
    which hides a key. distance_bias: (heads, 2 · reach + 1), added to the scores."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    added = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.float64)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        added = added.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        added = added + attn_mask.double()
    samples = []
    for b in range(q.shape[0]):
        mask = None if key_mask is None else key_mask[b : b + 1]

        def matrix(h, q_h, k_h, visible, b=b):
            def weigh(i: int, seen: Tensor) -> Tensor:
                scores = factor * (k_h[seen] @ q_h[i])
                scores = scores + (-math.log(len(seen)) if bias is None else bias)
                if distance_bias is not None:
                    position = k.shape[2] - q.shape[2] + i
                    scores = scores + of_distance(distance_bias[h], seen - position)
                return 1 / (1 + (-scores - added[b, h, i, seen]).exp())

            return rows(visible & (added[b, h] > -math.inf), weigh)

        samples.append(by_heads(matrix, q[b : b + 1], k[b : b + 1], v[b : b + 1], mask, is_causal))
    return torch.cat([out for out, _ in samples]), torch.cat([a for _, a in samples])
