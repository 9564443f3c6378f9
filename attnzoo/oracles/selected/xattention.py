"""XAttention, in float64, from the paper's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, leading_padding, oracle, softmax, softmax_over


@oracle("xattention")
def xattention(
    q,
    k,
    v,
    *,
    block_size,
    stride,
    threshold,
    max_blocks,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Xu et al. 2025, algorithm 1; causal, the choice of `stride` queries is made by the
    `block_size` queries before them."""
    assert attn_mask is None and q.shape[2] == k.shape[2]
    factor = (q.shape[3] ** -0.5 if scale is None else scale) / stride

    def matrix(_: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        n, real, lead = k_h.shape[0], visible[-1], leading_padding(visible)
        count = n - lead  # positions from the first real token on
        keys, queries, is_real = k_h[lead:].detach(), q_h[lead:].detach(), real[lead:]
        tiles, blocks = -(-count // stride), -(-count // block_size)

        def tile(x: Tensor, number: int) -> dict[int, Tensor]:
            places = range(number * stride, min(count, (number + 1) * stride))
            return {p - number * stride: x[p] for p in places if bool(is_real[p])}

        sides = [(tile(queries, a), tile(keys, a)) for a in range(tiles)]
        mass = torch.zeros(tiles, blocks, dtype=torch.float64)
        for a in range(tiles):
            if not sides[a][0]:
                continue
            seen = [b for b in range(tiles if not is_causal else a + 1) if sides[b][1]]
            scores = torch.zeros(len(seen), dtype=torch.float64)
            for place, b in enumerate(seen):
                for t, key in sides[b][1].items():
                    query = sides[a][0].get(stride - 1 - t)
                    if query is not None:
                        scores[place] += query @ key
            for b, weight in zip(seen, softmax(scores * factor).tolist(), strict=True):
                mass[a, b * stride // block_size] += weight
        chosen = torch.zeros_like(visible)
        each = block_size // stride
        for i in range(n):
            position = max(0, i - lead)
            own = position // block_size
            if is_causal:
                group = position // stride
                rows = range(max(0, group - each), group)
            else:
                rows = range(own * each, min(tiles, (own + 1) * each))
            weights = mass[list(rows)].sum(0).tolist()
            filled = [
                bool(is_real[b * block_size : (b + 1) * block_size].any()) for b in range(blocks)
            ]
            others = [b for b in range(blocks) if filled[b] and (b <= own or not is_causal)]
            total = sum(weights[b] for b in others)
            forced = sorted({0, own})
            ordered = forced + sorted(
                (b for b in others if b not in forced), key=lambda b: (-weights[b], b)
            )
            held = 0.0
            for place, b in enumerate(ordered[:max_blocks]):
                if place >= len(forced) and held >= threshold * total:
                    break
                held += weights[b] if b in others else 0.0
                first = lead + b * block_size
                chosen[i, first : first + block_size] = True
        return softmax_over(visible & chosen, q_h, k_h, scale)

    return by_heads(matrix, q, k, v, key_mask, is_causal)
