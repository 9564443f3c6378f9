"""The sums that stand for all keys and values so far: adding keys to them, reading rows of them.

Causal or not, a row of A·v is φ(q_i) times such sums, Σ_j φ(k_j) [v_j, 1]ᵀ, divided by what the
column of ones gives. Written in operators that autograd, a compiler and a counter can follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.decay import counted, product
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.key_weights import write_keys
from attnzoo.engines.linear.layout import grouped, ungrouped

CHUNK = 512  # tokens whose features are held at a time, where no row reads before all are summed


@dataclass(frozen=True)
class Past:
    """The keys and values so far, summed: Σ_j φ(k_j) [v_j, 1]ᵀ, divided by exp(log_scale).

    sums: (batch, kv_heads, width, value_dim + 1), its last column the normaliser. log_scale:
    (batch, kv_heads), the largest of any key so far; None where keys have none.
    """

    sums: Tensor
    log_scale: Tensor | None


def keys_of(
    feature_map: FeatureMap, k: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Features of keys and their log_scale (None: 0). A padded key has no features, or a log_scale
    of -inf."""
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
    log_scale."""
    dtype = accumulation_dtype(k.dtype)
    for start, keys, values in zip(
        range(0, k.shape[2], tokens), k.split(tokens, 2), v.split(tokens, 2), strict=True
    ):
        mask = None if key_mask is None else key_mask[:, start : start + tokens]
        features, log_scale = keys_of(feature_map, keys.to(dtype), mask)
        weights, shrink, largest = write_keys(log_scale, None if past is None else past.log_scale)
        if feature_map.decay.fades:
            count = counted(keys.shape[2], mask, keys.device)
            fresh, faded = feature_map.decay.of_keys(features, count)
            assert fresh is not None and faded is not None
            weights, shrink = product(weights, fresh[:, :, 0]), product(shrink, faded[:, :, 0])
        past = Past(
            added(
                None if past is None else past.sums,
                shrink,
                summed(features, weights, values.to(dtype)),
            ),
            largest,
        )
        del features  # before the next ones stand
    assert past is not None
    return past


def summed(features: Tensor, weights: Tensor | None, v: Tensor) -> Tensor:
    """Σ_j weights_j φ(k_j) [v_j, 1]ᵀ over the second last dimension."""
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
    """The normaliser to divide by: inf, so that the quotient is 0, where it is 0 (a row with
    nothing to see), or so small that only underflow can have left it, since its reciprocal would
    overflow in the backward pass."""
    return normalizer.masked_fill(normalizer.abs() < underflow(normalizer), float("inf"))


def underflow(x: Tensor) -> float:
    """What a normaliser of x's dtype must reach to be more than what underflow left of it."""
    return torch.finfo(x.dtype).tiny ** 0.8


def read_sums(feature_map: FeatureMap, sums: Tensor) -> Tensor:
    """What the features of a query are multiplied by: the last column is the normaliser's, and
    there only where a row has one."""
    if feature_map.normalizer == "row":
        return sums
    values = sums[..., :-1]
    return values / divisor(sums[..., -1:]) if feature_map.normalizer == "feature" else values


def read(
    feature_map: FeatureMap, call: Call, sums: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows of the call's queries, which all read the same sums, (batch, heads, query_length,
    value_dim) in q's dtype, and what they were divided by, (batch, heads, query_length, 1), where
    they were.

    sums: `read_sums` of them. out: where to write the rows, where no gradient is asked for.
    """
    features, group = feature_map.query(of_key_heads(call.q, call)), call.group
    normalizes = feature_map.normalizer == "row"
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
    """Rows of all queries, which read the same past, some at a time."""
    sums = read_sums(feature_map, past.sums)
    for queries in call.q.split(CHUNK, 2):
        yield read(feature_map, replace(call, q=queries), sums)[0]


def of_key_heads(x: Tensor, call: Call) -> Tensor:
    """(batch, heads, tokens, y) -> (batch, kv_heads, group * tokens, y), in the dtype of sums."""
    x = x.to(accumulation_dtype(x.dtype))
    return x if call.group == 1 else grouped(x, call.k.shape[1], 1)[:, :, 0]


def _of_heads(x: Tensor, group: int) -> Tensor:
    """The way back from `of_key_heads`."""
    return x if group == 1 else ungrouped(x[:, :, None], group)


def _write_rows(
    out: Tensor, features: Tensor, values: Tensor, divided_by: Tensor | None, group: int
) -> None:
    """out = features @ values / divided_by, of rows as `of_key_heads`."""
    if group > 1 or out.dtype != features.dtype:
        rows = features @ values if divided_by is None else (features @ values).div_(divided_by)
        out.copy_(_of_heads(rows, group))
    elif divided_by is None:
        write_product(out, features, values)
    else:
        torch.div(features @ values, divided_by, out=out)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, without a tensor between where the layout allows."""
    if out.is_contiguous() and out.dtype == a.dtype:
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.view(-1, *out.shape[2:]))
    else:
        out.copy_(a @ b)
