"""MoBA, in float64, from the paper's equations."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, leading_padding, oracle, softmax_over


@oracle("moba")
def moba(
    q, k, v, *, block_size, top_k, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Lu et al. 2025, equations 4 to 8: the top_k blocks of largest q·mean(k), the query's own
    before all others, in order of position where scores are equal."""
    assert attn_mask is None

    def matrix(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n, real = k.shape[0], visible[-1]  # the last query sees every real key
        offset, lead = n - q.shape[0], leading_padding(visible)
        blocks = [range(start, min(start + block_size, n)) for start in range(lead, n, block_size)]
        chosen = torch.zeros_like(visible)
        for i in range(q.shape[0]):
            position = offset + i
            scores = {}
            for number, block in enumerate(blocks):
                keys = [j for j in block if bool(real[j])]
                if position in block:
                    scores[number] = float("inf")
                elif keys and (block[-1] < position or not is_causal):
                    scores[number] = float(q[i].detach() @ k[keys].detach().mean(0))
            ordered = sorted(scores, key=lambda number: -scores[number])  # stable
            for number in ordered[:top_k]:
                chosen[i, list(blocks[number])] = True
        return softmax_over(visible & chosen, q, k, scale)

    return by_heads(matrix, q, k, v, key_mask, is_causal)
