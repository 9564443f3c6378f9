"""Reformer, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, oracle, softmax_over


@oracle("reformer")
def reformer(
    q,
    k,
    v,
    *,
    rotations,
    num_buckets,
    chunk_size,
    share_qk=False,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    scale=None,
) -> tuple[Tensor, Tensor]:
    """Kitaev et al. 2020, equations 2 to 5, with chunks by rank within the bucket: softmax over the
    union of the hash rounds' keys.

    rotations: (num_hashes, head_dim, num_buckets / 2), drawn with so few digits that a product with
    a float32 is exact in float64: only a tie of sums that agree to 15 digits could be broken
    otherwise here than in the library.
    """
    assert attn_mask is None
    scale = scale if scale is not None else 1.0 if share_qk else q.shape[3] ** -0.5

    factors = [num_buckets] if isinstance(num_buckets, int) else num_buckets

    def bucket(x: Tensor, rotation: Tensor) -> int:
        number, first = 0, 0
        for factor in factors:
            turned = x.detach() @ rotation[:, first : first + factor // 2].double()
            number = number * factor + (
                0 if factor == 1 else int(torch.cat([turned, -turned]).argmax())
            )
            first += factor // 2
        return number

    def matrix(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n, real = k.shape[0], visible[-1]  # the last query sees every real key
        offset = n - q.shape[0]
        support = torch.zeros_like(visible)
        for rotation in rotations:
            of_key = [bucket(x, rotation) for x in k]
            members = {
                b: [j for j in range(n) if of_key[j] == b and bool(real[j])] for b in set(of_key)
            }
            for i in range(q.shape[0]):
                mates = members.get(bucket(q[i], rotation), [])
                before = sum(j <= offset + i for j in mates)
                if before == 0 and is_causal:
                    continue
                chunk = max(before - 1, 0) // chunk_size
                for rank, j in enumerate(mates):
                    if chunk - 1 <= rank // chunk_size <= chunk + (not is_causal) and bool(
                        visible[i, j]
                    ):
                        support[i, j] = True
        for i in range(max(0, -offset), q.shape[0]):
            own = offset + i
            support[i, own] = False
            if bool(real[own]) and not (share_qk and bool(support[i].any())):
                support[i, own] = True
        if share_qk:
            k = k / torch.where(real, k.norm(dim=1), 1.0)[:, None]
        return softmax_over(support, q, k, scale)

    return by_heads(matrix, q, k, v, key_mask, is_causal)
