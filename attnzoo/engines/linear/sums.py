"""The sums that stand for all keys and values so far: adding keys to them, reading rows of them.

Causal or not, a row of A·v is φ(q_i) times such sums, Σ_j φ(k_j) [v_j, 1]ᵀ, divided by what the
column of ones gives, the normaliser (Katharopoulos et al. 2020, arXiv:2006.16236, section 3.2).
Written in operators that autograd, a compiler and a counter of operations can follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.call_checks import FLOATING
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.decay import counted, product
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.key_weights import write_keys
from attnzoo.engines.linear.layout import grouped, ungrouped

# Tokens whose features are held at a time, where all keys are summed before any row reads the sums.
CHUNK = 512
#: Rows up to which one product makes them and what they are divided by.
FEW_ROWS = 4
#: By dtype: the size below which a normaliser is taken for what underflow left of it.
UNDERFLOW = {dtype: torch.finfo(dtype).tiny ** 0.8 for dtype in FLOATING}


@dataclass(frozen=True)
class Past:
    """The keys and values so far, summed: Σ_j φ(k_j) [v_j, 1]ᵀ, divided by exp(log_scale).

    sums: (batch, kv_heads, width, value_dim + 1), whose last column makes the normaliser
    log_scale: (batch, kv_heads), the largest log_scale of any key so far; None where the feature
        map gives keys none
    """

    sums: Tensor
    log_scale: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self.sums] if self.log_scale is None else [self.sums, self.log_scale]

    def select(self, rows: Tensor) -> Self:
        """The past of these rows of the batch, (new_batch,) indices."""
        scale = None if self.log_scale is None else self.log_scale.index_select(0, rows)
        return replace(self, sums=self.sums.index_select(0, rows), log_scale=scale)


def keys_of(
    feature_map: FeatureMap, k: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Features of keys with padding hidden: a padded key gets a log_scale of -inf, or features of 0
    where the map has no log_scale.

    feature_map: the φ of keys
    k: (batch, kv_heads, length, head_dim)
    key_mask: (batch, length) bool, False in padded slots; None: no padding

    Returns features, (batch, kv_heads, length, width), and log_scale, (batch, kv_heads, length) or
    None.
    """
    features, log_scale = feature_map.key(k)
    if key_mask is None:
        return features, log_scale
    padded = ~key_mask[:, None]
    if log_scale is None:
        return features.masked_fill(padded[..., None], 0.0), None
    return features, log_scale.masked_fill(padded, float("-inf"))


def absorb(
    feature_map: FeatureMap,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    past: Past | None,
    tokens: int = CHUNK,
) -> Past:
    """Add keys and values to the past, some tokens at a time, under a running maximum of their
    log_scale.

    feature_map: the φ of keys
    k, v: (batch, kv_heads, length, head_dim or value_dim), of at least one token
    key_mask: (batch, length) bool, False in padded slots; None: no padding
    past: the sums so far; None when there are none
    tokens: how many tokens to take at a time
    """
    if k.shape[2] <= tokens:
        return _absorbed(feature_map, k, v, key_mask, past)
    for start, keys, values in zip(
        range(0, k.shape[2], tokens), k.split(tokens, 2), v.split(tokens, 2), strict=True
    ):
        mask = None if key_mask is None else key_mask[:, start : start + tokens]
        past = _absorbed(feature_map, keys, values, mask, past)
    assert past is not None
    return past


def _absorbed(
    feature_map: FeatureMap, k: Tensor, v: Tensor, key_mask: Tensor | None, past: Past | None
) -> Past:
    """As `absorb`, of keys that are taken at a time."""
    dtype = accumulation_dtype(k.dtype)
    features, log_scale = keys_of(feature_map, k.to(dtype), key_mask)
    weights, shrink, largest = write_keys(log_scale, None if past is None else past.log_scale)
    if feature_map.decay.fades:
        count = counted(k.shape[2], key_mask, k.device)
        fresh, faded = feature_map.decay.of_keys(features, count)
        weights = weights if fresh is None else product(weights, fresh[:, :, 0])
        shrink = shrink if faded is None else product(shrink, faded[:, :, 0])
    sums = None if past is None else past.sums
    if sums is not None and k.shape[2] == 1:
        keys = features if weights is None else features * weights[..., None]
        return Past(_written(sums, shrink, keys.mT, with_ones(v.to(dtype))), largest)
    return Past(added(sums, shrink, summed(features, weights, v.to(dtype))), largest)


def _written(sums: Tensor, shrink: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    """sums · shrink + key · value of one token, as column and row."""
    sums = sums if shrink is None else sums * shrink[..., None, None]
    return torch.addcmul(sums, key, value)


def with_ones(v: Tensor) -> Tensor:
    """[v_j, 1]: (..., value_dim) -> (..., value_dim + 1)."""
    return F.pad(v, (0, 1), value=1.0)


def summed(features: Tensor, weights: Tensor | None, v: Tensor) -> Tensor:
    """Σ_j weights_j φ(k_j) [v_j, 1]ᵀ.

    features: (..., length, width)
    weights: (..., length); None: all 1
    v: (..., length, value_dim)

    Returns (..., width, value_dim + 1).
    """
    if weights is None:
        return torch.cat([features.mT @ v, features.sum(-2)[..., None]], -1)
    return torch.cat(
        [features.mT @ (v * weights[..., None]), (weights[..., None, :] @ features).mT], -1
    )


def added(sums: Tensor | None, shrink: Tensor | None, more: Tensor) -> Tensor:
    """sums · shrink + more, where a missing sum is 0 and a missing factor 1."""
    if sums is None:
        return more
    return sums + more if shrink is None else torch.addcmul(more, sums, shrink[..., None, None])


def divisor(normalizer: Tensor) -> Tensor:
    """The normaliser to divide by, made safe.

    It becomes inf, so that the quotient is 0, where it is 0 (a row with nothing to see), and where
    it is so small that only underflow can have left it: its reciprocal would overflow in the
    backward pass.
    """
    return normalizer.masked_fill(normalizer.abs() < underflow(normalizer), float("inf"))


def underflow(x: Tensor) -> float:
    """The size below which a normaliser of x's dtype is taken for what underflow left of it."""
    return UNDERFLOW[x.dtype]


def read_sums(feature_map: FeatureMap, sums: Tensor) -> Tensor:
    """What the features of a query are multiplied by.

    sums: (batch, kv_heads, width, value_dim + 1), the sums over the keys

    Returns them as they are where rows are normalised, and else without the last column, after
    dividing by it where each feature is normalised by its sum.
    """
    if feature_map.normalizer == "row":
        return sums
    values = sums[..., :-1]
    return values / divisor(sums[..., -1:]) if feature_map.normalizer == "feature" else values


def read(
    feature_map: FeatureMap, call: Call, sums: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows of A·v for queries that all read the same sums.

    feature_map: the φ of queries
    call: whose q are the queries
    sums: what `read_sums` makes of the sums over the keys
    out: where to write the rows; only when no gradient is asked for

    Returns the rows, (batch, heads, query_length, value_dim) in q's dtype, and what they were
    divided by, (batch, heads, query_length, 1), or None where rows are not normalised.
    """
    features, group = feature_map.query(of_key_heads(call.q, call)), call.group
    normalizes = feature_map.normalizer == "row"
    if out is None and normalizes and features.shape[2] <= FEW_ROWS:
        both = features @ sums
        divided_by = divisor(both[..., -1:])
        rows = _of_heads(both[..., :-1] / divided_by, group).to(call.q.dtype)
        return rows, _of_heads(divided_by, group)
    divided_by = divisor(features @ sums[..., -1:]) if normalizes else None
    values = sums[..., :-1] if normalizes else sums
    if out is None:
        rows = features @ values
        rows = rows if divided_by is None else rows / divided_by
        out = _of_heads(rows, group).to(call.q.dtype)
    else:
        _write_rows(out, features, values, divided_by, group)
    return out, None if divided_by is None else _of_heads(divided_by, group)


def read_all(feature_map: FeatureMap, call: Call, past: Past) -> Iterator[Tensor]:
    """As `read`, the rows of all queries of the call, some at a time.

    past: the sums over all keys
    """
    sums = read_sums(feature_map, past.sums)
    if call.query_length <= CHUNK:
        yield read(feature_map, call, sums)[0]
        return
    for queries in call.q.split(CHUNK, 2):
        yield read(feature_map, replace(call, q=queries), sums)[0]


def of_key_heads(x: Tensor, call: Call) -> Tensor:
    """Put the rows of the query heads that share a key head below each other, in the dtype of sums:
    (batch, heads, tokens, y) -> (batch, kv_heads, group · tokens, y)."""
    x = x.to(accumulation_dtype(x.dtype))
    return x if call.group == 1 else grouped(x, call.k.shape[1], 1)[:, :, 0]


def _of_heads(x: Tensor, group: int) -> Tensor:
    """The way back from `of_key_heads`."""
    return x if group == 1 else ungrouped(x[:, :, None], group)


def _write_rows(
    out: Tensor, features: Tensor, values: Tensor, divided_by: Tensor | None, group: int
) -> None:
    """Write features @ values / divided_by, whose rows are laid out by `of_key_heads`, to `out`,
    whose rows are (batch, heads, tokens, value_dim)."""
    if group > 1 or out.dtype != features.dtype:
        rows = features @ values if divided_by is None else (features @ values).div_(divided_by)
        out.copy_(_of_heads(rows, group))
    elif divided_by is None:
        write_product(out, features, values)
    else:
        torch.div(features @ values, divided_by, out=out)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to `out`, without a tensor in between where the layout of `out` allows it."""
    if out.is_contiguous() and out.dtype == a.dtype:
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.view(-1, *out.shape[2:]))
    else:
        out.copy_(a @ b)
