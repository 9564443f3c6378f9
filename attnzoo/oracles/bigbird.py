"""BigBird, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, leading_padding, oracle, real_keys, softmax_over


@oracle("bigbird")
def bigbird(
    q,
    k,
    v,
    *,
    random_blocks,
    block_size,
    num_window_blocks,
    num_global_blocks,
    scale=None,
    softcap=None,
    distance_bias=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Zaheer et al. 2020, section 2: softmax over a *set* of keys, the union of window, global and
    random blocks. Blocks count from the first real key to the last; a row on the padding ahead of
    as many queries sees nothing.

    random_blocks: a function of which keys of a sample are real, (key_length,) bool, that gives
    (heads, query_blocks, num_random_blocks) key blocks drawn for each query block, -1 for none; its
    first row belongs to the block of the first query.
    """
    assert attn_mask is None
    query_length, key_length = q.shape[2], k.shape[2]

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        lead = leading_padding(visible)
        end = key_length if is_causal else max(real_keys(visible), default=-1) + 1
        key_blocks = -(-(end - lead) // block_size)
        global_blocks = bigbird_global_blocks(key_blocks, num_global_blocks, is_causal)
        drawn_blocks = random_blocks(visible[-1])
        first_block = (key_length - query_length - lead) // block_size
        chosen = torch.zeros_like(visible)
        for i in range(query_length):
            slot = key_length - query_length + i
            if 0 <= slot < lead and query_length == key_length:
                continue
            a = (slot - lead) // block_size
            window = {b for b in range(key_blocks) if abs(a - b) <= (num_window_blocks - 1) // 2}
            drawn = set(drawn_blocks[h, a - first_block].tolist()) - {-1}
            blocks = (
                set(range(key_blocks)) if a in global_blocks else window | global_blocks | drawn
            )
            for b in blocks:
                chosen[i, lead + b * block_size : lead + (b + 1) * block_size] = True
        by_distance = None if distance_bias is None else distance_bias[h]
        return softmax_over(
            visible & chosen, q_h, k_h, scale, softcap=softcap, by_distance=by_distance
        )

    return by_heads(matrix, q, k, v, key_mask, is_causal)


def bigbird_global_blocks(key_blocks: int, num_global_blocks: int, is_causal: bool) -> set[int]:
    """Causal: the first blocks. Otherwise half of them at each end, the odd one at the
    beginning."""
    everything = list(range(key_blocks))
    if is_causal:
        return set(everything[:num_global_blocks])
    at_end = num_global_blocks // 2
    return set(everything[: num_global_blocks - at_end]) | set(
        everything[max(0, key_blocks - at_end) :]
    )
