"""How far a variant's A and A·v are from exact attention's, block of rows by block of rows, in
float64.

Exact attention is written out here once more, away from the engines, so that a wrong engine cannot
agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.call import repeat_heads

ROWS = 256  # rows of exact A in memory at a time
WHOLE_LENGTH = 1024  # up to here every row of A is compared
# Of longer inputs: the 64 rows that end at each quarter of the length.
SAMPLED_BLOCKS, SAMPLED_ROWS = (4, 64)
TOP = 16


@dataclass(frozen=True)
class WeightDistance:
    """A against exact A.

    total_variation: mean over rows of ½ Σ_j |A_ij - exact_ij|.
    top_mass_kept: mean over rows of Σ_T A_ij / Σ_T exact_ij within [0, 1], T the 16 keys heaviest
    in exact.
    negative: the share of Σ |A_ij| that stands in entries below 0.
    row_sum: mean over rows of Σ_j |A_ij|, 1 in softmax.
    rows: rows compared, per layer and head.
    """

    total_variation: float
    top_mass_kept: float
    negative: float
    row_sum: float
    rows: int


def exact_rows(q: Tensor, k: Tensor, rows: range, *, is_causal: bool) -> Tensor:
    """Softmax's A in float64 for some query rows: (batch, heads, len(rows), keys), where a causal
    block stops at its last row's key."""
    scores = _scores(q.double(), k.double(), rows, is_causal)
    if is_causal:
        scores.masked_fill_(_future(rows, k.device), float("-inf"))
    return scores.softmax(-1)


def exact_output(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Exact attention in float64, (batch, heads, length, head_dim)."""
    values = repeat_heads(v, q.shape[1] // v.shape[1]).double()
    weights = (exact_rows(q, k, rows, is_causal=is_causal) for rows in _blocks(q.shape[2]))
    return torch.cat([block @ values[:, :, : block.shape[3]] for block in weights], 2)


def mean_value_output(v: Tensor, heads: int, *, is_causal: bool) -> Tensor:
    """The mean of the values that each query may see, the baseline of every comparison: float64,
    (batch, heads, length, head_dim)."""
    values = repeat_heads(v, heads // v.shape[1]).double()
    if not is_causal:
        return values.mean(2, keepdim=True).expand_as(values)
    return (
        values.cumsum(2)
        / torch.arange(1, v.shape[2] + 1, dtype=torch.float64, device=v.device)[:, None]
    )


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """||found - exact||_F / ||exact||_F of every layer and head, (batch, heads), float64."""
    return (found.double() - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))


def weight_distance(
    attention: Attention, q: Tensor, k: Tensor, *, is_causal: bool
) -> WeightDistance:
    """Compare `attention.weights` with exact A, layer by layer.

    Beyond 1,024 tokens a causal variant is compared on 256 rows: those that end at position b see b
    keys, and causality makes them the same rows in the prefix of b tokens, which costs less than
    the whole of A.
    """
    variation, kept, count = 0.0, 0.0, 0
    below = mass = 0.0
    for layer in range(q.shape[0]):
        for rows, weights in _weights(
            attention, q[layer : layer + 1], k[layer : layer + 1], is_causal
        ):
            exact = exact_rows(
                q[layer : layer + 1], k[layer : layer + 1], rows, is_causal=is_causal
            )
            exact = F.pad(exact, (0, weights.shape[3] - exact.shape[3]))  # a causal A is 0 there
            weights = weights.double()
            variation += float((weights - exact).abs().sum() / 2)
            kept += float(_top_mass_kept(weights, exact).sum())
            below += float(weights.clamp(max=0).sum().neg())
            mass += float(weights.abs().sum())
            count += exact.shape[1] * exact.shape[2]
    rows = count // (q.shape[0] * q.shape[1])
    negative = below / mass if mass else 0.0
    return WeightDistance(variation / count, kept / count, negative, mass / count, rows)


def score_std(q: Tensor, k: Tensor, *, is_causal: bool) -> float:
    """Standard deviation of q·k/√head_dim over all layers, heads and visible pairs."""
    total = squares = count = 0.0
    for rows in _blocks(q.shape[2]):
        scores = _scores(q, k, rows, is_causal)
        if is_causal:
            future = _future(rows, k.device)
            scores.masked_fill_(future, 0.0)
            count -= int(future.sum()) * q.shape[0] * q.shape[1]
        count += scores.numel()
        total += float(scores.sum(dtype=torch.float64))
        squares += float(scores.square_().sum(dtype=torch.float64))
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


def pooled(weights: Tensor, cells: int) -> Tensor:
    """(query_length, key_length) -> at most (cells, cells): the mass that a cell's queries put, on
    average, on all its keys."""
    queries, keys = (_membership(length, cells, weights) for length in weights.shape)
    return (queries / queries.sum(1, keepdim=True)) @ weights @ keys.T


def _weights(
    attention: Attention, q: Tensor, k: Tensor, is_causal: bool
) -> Iterator[tuple[range, Tensor]]:
    """Rows of one layer's A, with their positions."""
    length = q.shape[2]
    if length <= WHOLE_LENGTH or not is_causal or not attention.spec.cross:
        whole = attention.weights(q, k, is_causal=is_causal)
        for rows in _blocks(length):
            yield rows, whole[:, :, rows.start : rows.stop]
        return
    for block in range(1, SAMPLED_BLOCKS + 1):
        stop = length * block // SAMPLED_BLOCKS
        rows = range(max(stop - SAMPLED_ROWS, 0), stop)
        yield rows, attention.weights(q[:, :, rows.start : stop], k[:, :, :stop], is_causal=True)


def _top_mass_kept(weights: Tensor, exact: Tensor) -> Tensor:
    """(batch, heads, rows)."""
    mass, keys = exact.topk(min(TOP, exact.shape[3]), -1)
    return (weights.gather(-1, keys).sum(-1) / mass.sum(-1)).clamp(0, 1)


def _scores(q: Tensor, k: Tensor, rows: range, is_causal: bool) -> Tensor:
    """(batch, heads, rows, keys) in q's dtype; no causal row sees a key after the block's last row,
    so those are left out."""
    keys = repeat_heads(k[:, :, : rows.stop] if is_causal else k, q.shape[1] // k.shape[1])
    return q[:, :, rows.start : rows.stop] @ keys.transpose(2, 3) * q.shape[3] ** -0.5


def _future(rows: range, device: torch.device) -> Tensor:
    """(rows, rows.stop) bool: True where the key comes after the query."""
    keys = torch.arange(rows.stop, device=device)
    return keys > keys[rows.start :, None]


def _blocks(length: int) -> Iterator[range]:
    for start in range(0, length, ROWS):
        yield range(start, min(start + ROWS, length))


def _membership(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length) of 0 and 1: which cell a position belongs to."""
    cells = min(cells, length)
    cell = torch.arange(length, device=like.device) * cells // length
    return (cell == torch.arange(cells, device=like.device)[:, None]).to(like.dtype)
