"""What each attention is, in float64 loops written from the papers' equations. Imports nothing of the library.

Every oracle takes q, k, v, the masks, and as keyword arguments the variant's options and what it learned or drew, and
returns (out, A): out is (batch, heads, query_length, value_dim), A is (batch, heads, query_length, key_length).
All are differentiable. Query i stands at position key_length - query_length + i; a row that sees nothing is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Oracle = Callable[..., tuple[Tensor, Tensor]]
ORACLES: dict[str, Oracle] = {}
_HeadMatrix = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def oracle(name: str) -> Callable[[Oracle], Oracle]:
    """Enter a function into `ORACLES` under the name of the variant it specifies."""

    def enter(function: Oracle) -> Oracle:
        ORACLES[name] = function
        return function

    return enter


def _by_heads(matrix: _HeadMatrix, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Loop over samples and heads; `matrix(head, q, k, visible)` gives one head's A, (query_length, key_length)."""
    batch, heads, query_length, _ = q.shape
    kv_heads, key_length = k.shape[1], k.shape[2]
    samples, outputs = [], []
    for b in range(batch):
        visible = _visible(query_length, key_length, None if key_mask is None else key_mask[b], is_causal)
        real = torch.ones(key_length, dtype=torch.bool) if key_mask is None else key_mask[b]
        matrices, rows = [], []
        for h in range(heads):
            shared = h // (heads // kv_heads)
            keys = torch.where(real[:, None], k[b, shared].double(), 0.0)
            values = torch.where(real[:, None], v[b, shared].double(), 0.0)
            a = matrix(h, q[b, h].double(), keys, visible)
            matrices.append(a)
            rows.append(a @ values)
        samples.append(torch.stack(matrices))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs), torch.stack(samples)


def _visible(query_length: int, key_length: int, real: Tensor | None, is_causal: bool) -> Tensor:
    rows = []
    for i in range(query_length):
        position = key_length - query_length + i
        row = torch.ones(key_length, dtype=torch.bool) if real is None else real.clone()
        if is_causal:
            row[max(0, position + 1) :] = False
        rows.append(row)
    return torch.stack(rows)


def _real(visible: Tensor) -> list[int]:
    """Slots of the real keys: the last query sees them all."""
    return visible[-1].nonzero()[:, 0].tolist()


def _lead(visible: Tensor) -> int:
    """How many padded slots stand ahead of the first real one: positions count from there."""
    return next(iter(_real(visible)), 0)


def _rows(visible: Tensor, weigh: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A matrix whose row i holds weigh(i, seen) at the keys that the row sees, and 0 elsewhere."""
    rows = []
    for i in range(visible.shape[0]):
        row = torch.zeros(visible.shape[1], dtype=torch.float64)
        seen = visible[i].nonzero().squeeze(1)
        rows.append(row if seen.numel() == 0 else row.index_copy(0, seen, weigh(i, seen)))
    return torch.stack(rows)


def _softmax(scores: Tensor) -> Tensor:
    """exp(s_j) / Σ_l exp(s_l); 0 where every score is -inf."""
    if bool((scores == -math.inf).all()):
        return torch.zeros_like(scores)
    shifted = (scores - scores.max().detach()).exp()
    return shifted / shifted.sum()


def _normalised(products: Tensor) -> Tensor:
    """p_j / Σ_l p_l; 0 where the sum is exactly 0."""
    total = products.sum()
    return torch.zeros_like(products) if total.item() == 0.0 else products / total


def _softmax_over(visible: Tensor, q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    factor = q.shape[1] ** -0.5 if scale is None else scale

    def weigh(i: int, seen: Tensor) -> Tensor:
        scores = factor * (k[seen] @ q[i])
        return _softmax(scores if bias is None else scores + bias[i, seen])

    return _rows(visible, weigh)


@oracle("standard")
def standard(q, k, v, *, key_mask=None, attn_mask=None, is_causal=False, scale=None) -> tuple[Tensor, Tensor]:
    """Vaswani et al. 2017, equation 1. attn_mask: bool (True = attend) or added to the scores."""
    allowed = torch.ones(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        bias = attn_mask.double().expand(allowed.shape)
    samples = []
    for b in range(q.shape[0]):
        mask = None if key_mask is None else key_mask[b : b + 1]

        def matrix(h, q_h, k_h, visible, b=b):
            return _softmax_over(visible & allowed[b, h], q_h, k_h, scale, None if bias is None else bias[b, h])

        samples.append(_by_heads(matrix, q[b : b + 1], k[b : b + 1], v[b : b + 1], mask, is_causal))
    return torch.cat([out for out, _ in samples]), torch.cat([a for _, a in samples])


@oracle("flash")
def flash(q, k, v, *, scale=None, key_mask=None, attn_mask=None, is_causal=False) -> tuple[Tensor, Tensor]:
    """Dao et al. 2022, theorem 1: the output of standard attention."""
    return standard(q, k, v, scale=scale, key_mask=key_mask, attn_mask=attn_mask, is_causal=is_causal)


@oracle("linformer")
def linformer(q, k, v, *, key_projection, value_projection, key_mask=None, attn_mask=None, is_causal=False, scale=None) -> tuple[Tensor, Tensor]:
    """Wang et al. 2020, equation 7: softmax(scale · q (Eᵀk)ᵀ) Fᵀv with E, F of shape (heads or 1, max_length, rank).

    A, row by row, is softmax(scale · q_i (Eᵀk)ᵀ) Fᵀ with the columns of padded keys 0.
    """
    assert not is_causal and attn_mask is None
    n = k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        lead = _lead(visible)
        e, f = (
            torch.cat([torch.zeros(lead, x.shape[2]), x[h if x.shape[0] > 1 else 0, : n - lead].double()]) for x in (key_projection, value_projection)
        )
        projected = sum((torch.outer(e[j], k_h[j]) for j in range(n)), torch.zeros(e.shape[1], k_h.shape[1], dtype=torch.float64))
        rows = []
        for i in range(q_h.shape[0]):
            slots = _softmax(scale * (projected @ q_h[i]))
            rows.append(torch.where(visible[i], f @ slots, 0.0))
        return torch.stack(rows)

    return _by_heads(matrix, q, k, v, key_mask, False)


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": _elu_plus_one,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "identity": lambda x: x,
}


def _kernel(phi_q: Callable[[Tensor], Tensor], phi_k: Callable[[Tensor], Tensor], normalize: bool) -> _HeadMatrix:
    """A_ij = phi(q_i)·phi(k_j) / Σ_l phi(q_i)·phi(k_l), the sum over the keys that i sees."""

    def matrix(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        queries, keys = phi_q(q), phi_k(k)

        def weigh(i: int, seen: Tensor) -> Tensor:
            products = keys[seen] @ queries[i]
            return _normalised(products) if normalize else products

        return _rows(visible, weigh)

    return matrix


def _efficient(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Shen et al. 2021, equation 5: softmax over the features of a query, softmax over the keys that it sees of each feature."""

    def weigh(i: int, seen: Tensor) -> Tensor:
        weight_of_feature = q[i].softmax(0)
        keys = k[seen]
        share_of_key = (keys - keys.max(0).values.detach()).exp()
        return (share_of_key / share_of_key.sum(0)) @ weight_of_feature

    return _rows(visible, weigh)


def _series(normalize: bool, _: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Arora et al. 2024, Based: the exponential of a score by its series, to the second order."""

    def weigh(i: int, seen: Tensor) -> Tensor:
        scores = k[seen] @ q[i] / math.sqrt(q.shape[-1])
        series = 1 + scores + scores * scores / 2
        return _normalised(series) if normalize else series

    return _rows(visible, weigh)


@oracle("linear")
def linear(q, k, v, *, feature_map="elu", normalize=True, key_mask=None, attn_mask=None, is_causal=False) -> tuple[Tensor, Tensor]:
    """Katharopoulos et al. 2020, equations 4 and 8; `softmax` is Shen et al. 2021. feature_map: a name or a callable."""
    assert attn_mask is None
    if feature_map == "softmax":
        return _by_heads(_efficient, q, k, v, key_mask, is_causal)
    if feature_map == "taylor":
        return _by_heads(partial(_series, normalize), q, k, v, key_mask, is_causal)
    phi = feature_map if callable(feature_map) else FEATURE_MAPS[feature_map]
    return _by_heads(_kernel(phi, phi, normalize), q, k, v, key_mask, is_causal)


def random_features(x: Tensor, projection: Tensor, features: str) -> Tensor:
    """Choromanski et al. 2021, Lemma 1 and equation 5: features whose products estimate exp(x·y) (`relu`: another kernel).

    x: (..., head_dim); projection: (num_features, head_dim), its rows the draws of omega.
    """
    m = projection.shape[0]
    along = x @ projection.T
    half_norm = (x * x).sum(-1, keepdim=True) / 2
    if features == "positive":
        return (along - half_norm).exp() / math.sqrt(m)
    if features == "hyperbolic":
        return torch.cat([(along - half_norm).exp(), (-along - half_norm).exp()], -1) / math.sqrt(2 * m)
    if features == "trigonometric":
        return half_norm.exp() * torch.cat([along.sin(), along.cos()], -1) / math.sqrt(m)
    if features == "relu":
        return along.clamp(min=0) / math.sqrt(m)
    raise ValueError(features)


@oracle("performer")
def performer(q, k, v, *, projection, features="positive", scale=None, key_mask=None, attn_mask=None, is_causal=False) -> tuple[Tensor, Tensor]:
    """Choromanski et al. 2021: linear attention with random features of q·√scale and k·√scale."""
    assert attn_mask is None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    projection = projection.double()

    def phi(x: Tensor) -> Tensor:
        return random_features(x * math.sqrt(scale), projection, features)

    return _by_heads(_kernel(phi, phi, True), q, k, v, key_mask, is_causal)


@oracle("sliding_window")
def sliding_window(
    q, k, v, *, window, dilation=1, sinks=0, logits=None, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Beltagy et al. 2020, section 3.1: softmax over the keys at position + t · dilation for |t| < window; dilation may differ by head.

    sinks: and the first real keys (Xiao et al. 2023). logits: (heads,), each exponentiated in the denominator of every row of its head.
    """
    assert attn_mask is None

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        step = dilation if isinstance(dilation, int) else dilation[h]
        near = torch.zeros_like(visible)
        for i in range(q_h.shape[0]):
            position = k_h.shape[0] - q_h.shape[0] + i
            for t in range(1 - window, window):
                if 0 <= position + t * step < k_h.shape[0]:
                    near[i, position + t * step] = True
            near[i, _real(visible)[:sinks]] = True
        if logits is None:
            return _softmax_over(visible & near, q_h, k_h, scale)
        factor, own = q_h.shape[1] ** -0.5 if scale is None else scale, logits[h].double()

        def weigh(i: int, seen: Tensor) -> Tensor:
            scores = factor * (k_h[seen] @ q_h[i])
            largest = torch.maximum(scores.max(), own).detach()
            terms = (scores - largest).exp()
            return terms / (terms.sum() + (own - largest).exp())

        return _rows(visible & near, weigh)

    return _by_heads(matrix, q, k, v, key_mask, is_causal)


@oracle("sparse_transformer")
def sparse_transformer(
    q, k, v, *, pattern="strided", stride=128, expressivity=8, factors="merged", scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Child et al. 2019, sections 4.2 and 4.3: softmax over A1, A2 (one a head, in turn), or their union."""
    assert attn_mask is None

    def shows(factor: int, i: int, j: int) -> bool:
        if pattern == "strided":
            return (i - stride <= j <= i + stride, (i - j) % stride == 0)[factor]
        return (j // stride == i // stride, j % stride in range(stride - expressivity, stride))[factor]

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        n, wanted, lead = k_h.shape[0], (0, 1) if factors == "merged" else (h % 2,), _lead(visible)
        chosen = torch.zeros_like(visible)
        for i in range(q_h.shape[0]):
            slot = n - q_h.shape[0] + i
            if pattern == "strided" or not 0 <= slot < lead:  # blocks count from the first real token
                chosen[i] = torch.tensor([any(shows(factor, slot - lead, j - lead) for factor in wanted) for j in range(n)])
        return _softmax_over(visible & chosen, q_h, k_h, scale)

    return _by_heads(matrix, q, k, v, key_mask, is_causal)


@oracle("bigbird")
def bigbird(
    q, k, v, *, random_blocks, block_size, num_window_blocks, num_global_blocks, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Zaheer et al. 2020, section 2: softmax over a *set* of keys, the union of window, global and random blocks. Blocks count from the first
    real key to the last; a row on the padding ahead sees nothing.

    random_blocks: a function of which keys of a sample are real, (key_length,) bool, that gives (heads, query_blocks, num_random_blocks) key
    blocks drawn for each query block, -1 for none; its first row belongs to the block of the first query.
    """
    assert attn_mask is None
    query_length, key_length = q.shape[2], k.shape[2]

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        lead = _lead(visible)
        end = key_length if is_causal else max(_real(visible), default=-1) + 1
        key_blocks = -(-(end - lead) // block_size)
        global_blocks = bigbird_global_blocks(key_blocks, num_global_blocks, is_causal)
        drawn_blocks = random_blocks(visible[-1])
        first_block = (key_length - query_length - lead) // block_size
        chosen = torch.zeros_like(visible)
        for i in range(query_length):
            slot = key_length - query_length + i
            if 0 <= slot < lead:
                continue
            a = (slot - lead) // block_size
            window = {b for b in range(key_blocks) if abs(a - b) <= (num_window_blocks - 1) // 2}
            drawn = set(drawn_blocks[h, a - first_block].tolist()) - {-1}
            blocks = set(range(key_blocks)) if a in global_blocks else window | global_blocks | drawn
            for b in blocks:
                chosen[i, lead + b * block_size : lead + (b + 1) * block_size] = True
        return _softmax_over(visible & chosen, q_h, k_h, scale)

    return _by_heads(matrix, q, k, v, key_mask, is_causal)


def bigbird_global_blocks(key_blocks: int, num_global_blocks: int, is_causal: bool) -> set[int]:
    """Causal: the first blocks. Otherwise half of them at each end, the odd one at the beginning."""
    everything = list(range(key_blocks))
    if is_causal:
        return set(everything[:num_global_blocks])
    at_end = num_global_blocks // 2
    return set(everything[: num_global_blocks - at_end]) | set(everything[max(0, key_blocks - at_end) :])


@oracle("nystromformer")
def nystromformer(
    q, k, v, *, num_landmarks=64, iterations=6, convolution_weight=None, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Xiong et al. 2021, equations 13 and 14, over the real tokens alone; convolution_weight: (heads, 1, size, 1), added as a band of A."""
    assert not is_causal and attn_mask is None and q.shape[2] == k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        n = k_h.shape[0]
        real = visible[0].nonzero().squeeze(1).tolist()
        a = torch.zeros(n, n, dtype=torch.float64)
        if real:
            members: dict[int, list[int]] = {}
            for rank, token in enumerate(real):
                members.setdefault(rank * num_landmarks // len(real), []).append(token)
            q_landmarks = torch.stack([q_h[some].mean(0) for some in members.values()])
            k_landmarks = torch.stack([k_h[some].mean(0) for some in members.values()])
            front = torch.stack([_softmax(scale * (k_landmarks @ row)) for row in q_h])
            kernel = torch.stack([_softmax(scale * (k_landmarks @ row)) for row in q_landmarks])
            back = torch.stack([_softmax(scale * (k_h[real] @ row)) for row in q_landmarks])
            inverse = kernel.T / (kernel.sum(0).max() * kernel.sum(1).max())
            one = torch.eye(len(members), dtype=torch.float64)
            for _ in range(iterations):
                az = kernel @ inverse
                inverse = inverse @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
            a = a.index_copy(1, torch.tensor(real), front @ inverse @ back)
        if convolution_weight is not None:
            size = convolution_weight.shape[2]
            band = torch.zeros(n, n, dtype=torch.float64)
            for i in range(n):
                for place in range(size):
                    j = i + place - size // 2
                    if 0 <= j < n and bool(visible[0, j]):
                        band[i, j] = 1.0
            weights = torch.stack([convolution_weight[h, 0, :, 0].double()[(torch.arange(n) - i + size // 2).clamp(0, size - 1)] for i in range(n)])
            a = a + band * weights
        return a

    return _by_heads(matrix, q, k, v, key_mask, False)


@oracle("longformer")
def longformer(
    q, k, v, *, window, dilation=1, global_tokens=0, global_mask=None, global_qkv=None, scale=None, key_mask=None, attn_mask=None, is_causal=False
) -> tuple[Tensor, Tensor]:
    """Beltagy et al. 2020, section 3.1: softmax over the window and the global tokens; over every key, with projections of its own, where
    the query is global. Global are the first real tokens and the real ones among global_mask."""
    assert attn_mask is None
    key_length, offset = k.shape[2], k.shape[2] - q.shape[2]
    outputs, samples = [], []
    for b in range(q.shape[0]):
        real = [j for j in range(key_length) if key_mask is None or bool(key_mask[b, j])]
        named = set(real[:global_tokens]) | {j for j in real if global_mask is not None and bool(global_mask[b, j])}

        def local(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor, named=named) -> Tensor:
            support, step = torch.zeros_like(visible), dilation if isinstance(dilation, int) else dilation[h]
            for i in range(q_h.shape[0]):
                support[i, sorted({j for j in range(key_length) if (offset + i - j) % step == 0 and abs(offset + i - j) < window * step} | named)] = (
                    True
                )
            return _softmax_over(visible & support, q_h, k_h, scale)

        def everywhere(_: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
            return _softmax_over(visible, q_h, k_h, scale)

        one = slice(b, b + 1)
        mask = None if key_mask is None else key_mask[one]
        out, a = _by_heads(local, q[one], k[one], v[one], mask, is_causal)
        own_q, own_k, own_v = (x[one] for x in ((q, k, v) if global_qkv is None else global_qkv))
        out_of_globals, a_of_globals = _by_heads(everywhere, own_q, own_k, own_v, mask, is_causal)
        is_global = torch.tensor([offset + i in named for i in range(q.shape[2])], dtype=torch.bool)[:, None]
        outputs.append(torch.where(is_global, out_of_globals, out))
        samples.append(torch.where(is_global, a_of_globals, a))
    return torch.cat(outputs), torch.cat(samples)


@oracle("cosformer")
def cosformer(q, k, v, *, max_length, key_mask=None, attn_mask=None, is_causal=False) -> tuple[Tensor, Tensor]:
    """Qin et al. 2022, equation 10, term by term."""
    assert attn_mask is None

    def matrix(_: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        def weigh(i: int, seen: Tensor) -> Tensor:
            position = k_h.shape[0] - q_h.shape[0] + i
            near = (math.pi / 2 * (position - seen.double()) / max_length).cos()
            return _normalised((k_h[seen].clamp(min=0) @ q_h[i].clamp(min=0)) * near)

        return _rows(visible, weigh)

    return _by_heads(matrix, q, k, v, key_mask, is_causal)


@oracle("retention")
def retention(q, k, v, *, scale=None, key_mask=None, attn_mask=None, is_causal=False) -> tuple[Tensor, Tensor]:
    """Sun et al. 2023, equation 5, with a γ for each head of keys."""
    assert is_causal and attn_mask is None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]

    def matrix(h: int, q_h: Tensor, k_h: Tensor, visible: Tensor) -> Tensor:
        gamma = 1 - 2.0 ** (-5 - h // group)

        def weigh(i: int, seen: Tensor) -> Tensor:
            position = k_h.shape[0] - q_h.shape[0] + i
            since = torch.stack([visible[-1, j + 1 : position + 1].sum() for j in seen.tolist()])  # real tokens: padding does not fade
            return scale * (k_h[seen] @ q_h[i]) * gamma ** since.double()

        return _rows(visible, weigh)

    return _by_heads(matrix, q, k, v, key_mask, True)


@oracle("reformer")
def reformer(
    q, k, v, *, rotations, num_buckets, chunk_size, share_qk=False, key_mask=None, attn_mask=None, is_causal=False, scale=None
) -> tuple[Tensor, Tensor]:
    """Kitaev et al. 2020, equations 2 to 5, with chunks by rank within the bucket: softmax over the union of the hash rounds' keys.

    rotations: (num_hashes, head_dim, num_buckets / 2), drawn with so few digits that a product with a float32 is exact in float64: only a tie
    of sums that agree to 15 digits could be broken otherwise here than in the library.
    """
    assert attn_mask is None
    scale = scale if scale is not None else 1.0 if share_qk else q.shape[3] ** -0.5

    factors = [num_buckets] if isinstance(num_buckets, int) else num_buckets

    def bucket(x: Tensor, rotation: Tensor) -> int:
        number, first = 0, 0
        for factor in factors:
            turned = x.detach() @ rotation[:, first : first + factor // 2].double()
            number = number * factor + (0 if factor == 1 else int(torch.cat([turned, -turned]).argmax()))
            first += factor // 2
        return number

    def matrix(_: int, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        n, real = k.shape[0], visible[-1]  # the last query sees every real key
        offset = n - q.shape[0]
        support = torch.zeros_like(visible)
        for rotation in rotations:
            of_key = [bucket(x, rotation) for x in k]
            members = {b: [j for j in range(n) if of_key[j] == b and bool(real[j])] for b in set(of_key)}
            for i in range(q.shape[0]):
                mates = members.get(bucket(q[i], rotation), [])
                before = sum(j <= offset + i for j in mates)
                if before == 0 and is_causal:
                    continue
                chunk = max(before - 1, 0) // chunk_size
                for rank, j in enumerate(mates):
                    if chunk - 1 <= rank // chunk_size <= chunk + (not is_causal) and bool(visible[i, j]):
                        support[i, j] = True
        for i in range(max(0, -offset), q.shape[0]):
            own = offset + i
            support[i, own] = False
            if bool(real[own]) and not (share_qk and bool(support[i].any())):
                support[i, own] = True
        if share_qk:
            k = k / torch.where(real, k.norm(dim=1), 1.0)[:, None]
        return _softmax_over(support, q, k, scale)

    return _by_heads(matrix, q, k, v, key_mask, is_causal)
