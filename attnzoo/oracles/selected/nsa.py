"""Native sparse attention, in float64, from the paper's equations."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from attnzoo.oracles.matrix import oracle, rows, softmax, visible_keys

FIRST, PREVIOUS, OWN = 2**60, 2**61, 2**62  # above any sum of shares of a softmax
DIGITS = 2.0**30  # to which these are compared


@oracle("nsa")
def nsa(
    q,
    k,
    v,
    *,
    block_size,
    top_k,
    window_size,
    compressed_size=None,
    compressed_stride=None,
    importance="probabilities",
    first_block=True,
    places=None,
    inner=None,
    outer=None,
    scale=None,
    key_mask=None,
    attn_mask=None,
    is_causal=False,
    compressed_gate=None,
    selected_gate=None,
    window_gate=None,
) -> tuple[Tensor, Tensor]:
    """Yuan et al. 2025, equations 5 to 12 with mean pooling: gates times softmax over the means of
    compressed_size past keys at every compressed_stride-th, over the keys of selected blocks, and
    over the nearest window_size keys. Gates: (batch, heads, query_length); a third each where none
    is given. The key of a pool is outer relu(inner [key + place, ...]) where these are given:
    places (compressed_size, width), inner (hidden, compressed_size · width), outer (width, hidden).
    importance: of a block, by the mean of its heads' probabilities or of their logits."""
    assert is_causal and attn_mask is None
    batch, heads, length, width = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    factor = width**-0.5 if scale is None else scale
    real = torch.ones(batch, n, dtype=torch.bool) if key_mask is None else key_mask
    keys, values = (torch.where(real[:, None, :, None], x, 0.0).double() for x in (k, v))
    q = q.double()
    size = block_size if compressed_size is None else compressed_size
    stride = size if compressed_stride is None else compressed_stride

    def of_sample(b: int) -> Tensor:
        visible = visible_keys(length, n, real[b], True)
        lead = int(real[b].long().argmax())
        blocks = [
            [j for j in range(start, min(start + block_size, n)) if bool(real[b, j])]
            for start in range(lead, n, block_size)
        ]

        pools = [
            [j for j in range(start, min(start + size, n)) if bool(real[b, j])]
            for start in range(lead, n, stride)
        ]

        def ended(i: int) -> list[int]:
            """Means of some key whose keys end at row i or before it."""
            before = n - length + i - lead + 1
            return [c for c, pool in enumerate(pools) if pool and c * stride + size <= before]

        def of_pool(shared: int, c: int) -> Tensor:
            """The mean, 0 where there are no keys, or what the network makes of the slots."""
            if inner is None or outer is None or places is None:
                return keys[b, shared, pools[c]].sum(0) / max(1, len(pools[c]))
            assert places is not None and outer is not None
            slots = [q.new_zeros(width)] * size
            for j in pools[c]:
                place = j - lead - c * stride
                slots[place] = keys[b, shared, j] + places[place].double()
            return outer.double() @ (inner.double() @ torch.cat(slots)).relu()

        @cache
        def means(shared: int) -> Tensor:
            return torch.stack([of_pool(shared, c) for c in range(len(pools))])

        def logits(h: int, i: int) -> Tensor:
            return factor * means(h // group)[ended(i)] @ q[b, h, i]

        @cache
        def shares(h: int, i: int) -> Tensor:
            """What every ended mean weighs in row i of a head."""
            return softmax(logits(h, i)) if ended(i) else q.new_zeros(0)

        def compressed(h: int, i: int) -> Tensor:
            past = ended(i)
            at = [j for c in past for j in pools[c]]
            pool = [place for place, c in enumerate(past) for _ in pools[c]]
            sizes = q.new_tensor([len(pools[c]) for c in past])
            each = shares(h, i) / sizes
            return q.new_zeros(n).index_add(0, torch.tensor(at).long(), each[pool])

        def selected(h: int, i: int) -> list[int]:
            """Keys of the blocks that the heads which share keys choose together."""
            own = (n - length + i - lead) // block_size
            first = h // group * group
            together = range(first, first + group)
            if importance == "logits" and ended(i):
                mean = softmax(sum(logits(head, i).detach() for head in together) / group)
            else:
                mean = sum(shares(head, i).detach() for head in together) / group
            sums = {c: 0.0 for c in range(own) if blocks[c]}
            for c, share in zip(ended(i), mean, strict=True):
                for start in range(c * stride, c * stride + size, stride):
                    if start // block_size in sums:
                        sums[start // block_size] += float(share)
            scores = {c: round(total * DIGITS) for c, total in sums.items()}
            forced = ((0, FIRST),) if first_block else ()
            for c, score in (*forced, (own - 1, PREVIOUS)):
                if c in scores:
                    scores[c] = score
            if 0 <= own < len(blocks):
                scores[own] = OWN
            ordered = sorted(scores, key=lambda c: -scores[c])  # stable
            return [j for c in ordered[:top_k] for j in blocks[c]]

        def near(h: int, i: int) -> list[int]:
            position = n - length + i
            return list(range(max(0, position - window_size + 1), max(0, position + 1)))

        def over(h: int, allowed) -> Tensor:
            """Softmax over the keys that a row is allowed and sees."""
            seen = torch.zeros_like(visible)
            for i in range(length):
                seen[i, allowed(h, i)] = True

            def weigh(i: int, some: Tensor) -> Tensor:
                return softmax(factor * (keys[b, h // group, some] @ q[b, h, i]))

            return rows(visible & seen, weigh)

        def of_head(h: int) -> Tensor:
            branches = (
                torch.stack([compressed(h, i) for i in range(length)]),
                over(h, selected),
                over(h, near),
            )
            gates = (compressed_gate, selected_gate, window_gate)
            weights = [1 / 3 if gate is None else gate[b, h].double()[:, None] for gate in gates]
            return torch.stack([w * a for w, a in zip(weights, branches, strict=True)]).sum(0)

        return torch.stack([of_head(h) for h in range(heads)])

    a = torch.stack([of_sample(b) for b in range(batch)])
    return a @ values.repeat_interleave(group, 1), a
