"""Longformer, in float64, from the paper's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.oracles.matrix import by_heads, oracle, softmax_over


@oracle("longformer")
def longformer(
    q,
    k,
    v,
    *,
    window,
    dilation=1,
    global_tokens=0,
    global_mask=None,
    global_qkv=None,
    scale=None,
    softcap=None,
    distance_bias=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
) -> tuple[Tensor, Tensor]:
    """Beltagy et al. 2020, section 3.1: softmax over the window and the global tokens; over every
    key, with projections of its own, where the query is global. Global are the first real tokens
    and the real ones among global_mask."""
    assert attn_mask is None
    key_length, offset = k.shape[2], k.shape[2] - q.shape[2]
    outputs, samples = [], []
    for b in range(q.shape[0]):
        real = [j for j in range(key_length) if key_mask is None or bool(key_mask[b, j])]
        named = set(real[:global_tokens]) | {
            j for j in real if global_mask is not None and bool(global_mask[b, j])
        }

        def local(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor, named=named) -> Tensor:
            support, step = (
                torch.zeros_like(visible),
                dilation if isinstance(dilation, int) else dilation[h],
            )
            for i in range(q_h.shape[0]):
                support[
                    i,
                    sorted(
                        {
                            j
                            for j in range(key_length)
                            if (offset + i - j) % step == 0 and abs(offset + i - j) < window * step
                        }
                        | named
                    ),
                ] = True
            by_distance = None if distance_bias is None else distance_bias[h]
            return softmax_over(
                visible & support, q_h, k_h, scale, softcap=softcap, by_distance=by_distance
            )

        def everywhere(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
            by_distance = None if distance_bias is None else distance_bias[h]
            return softmax_over(visible, q_h, k_h, scale, softcap=softcap, by_distance=by_distance)

        one = slice(b, b + 1)
        mask = None if key_mask is None else key_mask[one]
        out, a = by_heads(local, q[one], k[one], v[one], mask, is_causal)
        own_q, own_k, own_v = (x[one] for x in ((q, k, v) if global_qkv is None else global_qkv))
        out_of_globals, a_of_globals = by_heads(everywhere, own_q, own_k, own_v, mask, is_causal)
        is_global = torch.tensor(
            [offset + i in named for i in range(q.shape[2])], dtype=torch.bool
        )[:, None]
        outputs.append(torch.where(is_global, out_of_globals, out))
        samples.append(torch.where(is_global, a_of_globals, a))
    return torch.cat(outputs), torch.cat(samples)
