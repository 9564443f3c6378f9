"""DeepSeek's sparse attention, in float64, from the report's equations."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, leading_padding, oracle, softmax_over


@oracle("indexed")
def indexed(
    q,
    k,
    v,
    *,
    top_k,
    block_size=1,
    per_group=False,
    q_index=None,
    k_index=None,
    w_index=None,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-AI 2025, equations 1 and 2: softmax over the top_k keys of largest index score, the
    earlier ones where scores are equal; or over the blocks whose largest score is largest. Blocks
    count from the first real key.

    q_index, k_index, w_index: None: q, k and 1, and each key head chooses for its own heads.
    """
    assert attn_mask is None
    own = q_index is None or k_index is None or w_index is None
    if q_index is None or k_index is None or w_index is None:
        q_index, k_index, w_index = q, k, torch.ones(q.shape[:3])
    index_heads, kv_heads = q_index.shape[1], k.shape[1]
    samples = []
    for b in range(q.shape[0]):
        one = slice(b, b + 1)

        def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor, b: int = b) -> Tensor:
            n, lead = k_h.shape[0], leading_padding(visible)
            kv_head = h // (q.shape[1] // kv_heads)
            each = index_heads // kv_heads
            asked = range(index_heads)
            if own or per_group:
                asked = range(kv_head * each, (kv_head + 1) * each)
            chosen = torch.zeros_like(visible)
            scores = torch.zeros(q_h.shape[0], n, dtype=torch.float64)
            for head in asked:
                keys = k_index[b, head // (index_heads // k_index.shape[1])].detach().double()
                # One key at a time, so that equal keys have equal scores.
                products = (q_index[b, head].detach().double()[:, None] * keys).sum(-1)
                scores += w_index[b, head, :, None].detach().double() * products.clamp(min=0)
            for i, row in enumerate(scores.tolist()):
                blocks: dict[int, float] = {}
                for s in visible[i].nonzero()[:, 0].tolist():
                    number = (s - lead) // block_size
                    blocks[number] = max(row[s], blocks.get(number, -float("inf")))
                best = sorted(blocks, key=lambda number: (-blocks[number], number))
                for number in best[: top_k // block_size]:
                    first = lead + number * block_size
                    chosen[i, first : min(n, first + block_size)] = True
            return softmax_over(visible & chosen, q_h, k_h, scale)

        mask = None if key_mask is None else key_mask[one]
        samples.append(by_heads(matrix, q[one], k[one], v[one], mask, is_causal))
    out, weights = zip(*samples, strict=True)
    return torch.cat(out), torch.cat(weights)
