"""The linear engine where every query sees every key, with a backward pass of its own.

First come the sums over all keys, then what each query reads of them, for as many heads and tokens
at a time as fit the caches of all threads. Autograd cannot look into this code;
`gradient.attend_openly` computes the same in operators that it can follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.decay import counted, product
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.key_weights import weights_of
from attnzoo.engines.linear.layout import add_product_, ungrouped, with_ones
from attnzoo.engines.linear.sums import (
    CHUNK,
    Past,
    absorb,
    divisor,
    keys_of,
    of_key_heads,
    read,
    read_sums,
    write_product,
)

IN_CACHE = 2**18  # a head with at most so many features in all is computed whole
# Tokens, over all its heads, that a thread has at a time, unless one whole head has more.
ROWS = 2048


@dataclass(frozen=True)
class Slab:
    """Some heads of some samples, which are computed together.

    samples, heads, kv_heads: which samples, query heads and key heads
    tokens: how many of their tokens to take at a time
    """

    samples: slice
    heads: slice
    kv_heads: slice
    tokens: int

    def of(self, call: Call) -> Call:
        return call.select(batch=self.samples, heads=self.heads)

    def queries(self, x: Tensor) -> Tensor:
        return x[self.samples, self.heads]

    def keys(self, x: Tensor) -> Tensor:
        return x[self.samples, self.kv_heads]


def slab_sizes(
    width: int, kv_heads: int, group: int, length: int, threads: int
) -> tuple[int, int, int]:
    """How much a slab (see `Slab`) holds.

    Heads are taken whole, because a whole head lies in one piece of memory, so that a product can
    be written to its place in the output.

    width: number of features of a key
    kv_heads, group: key heads, and query heads that share each of them
    length: the longer of queries and keys
    threads: how many threads compute a slab together

    Returns its samples, its key heads, and the tokens to take at a time.
    """
    tokens = length if length * group * width <= IN_CACHE else CHUNK
    together = threads * max(1, ROWS // (tokens * group))
    return max(1, together // kv_heads), min(together, kv_heads), tokens


def slabs(feature_map: FeatureMap, call: Call, pasts: Sequence[Past | None] = ()) -> Iterator[Slab]:
    """Slabs that together hold every head of every sample of the call.

    pasts: in a backward pass, the sums that the forward pass left, whose shape repeats its slabs
        whatever the number of threads is now
    """
    (batch_size, kv_heads, keys), group = call.k.shape[:3], call.group
    width, length = (
        feature_map.width_of(call.k[:0].to(accumulation_dtype(call.k.dtype))),
        max(1, keys, call.query_length),
    )
    samples, heads, tokens = slab_sizes(width, kv_heads, group, length, torch.get_num_threads())
    if call.q.device.type != "cpu":  # no cache to fit
        samples, heads, tokens = max(1, batch_size), kv_heads, CHUNK
    elif pasts and pasts[0] is not None:
        samples, heads = pasts[0].sums.shape[:2]
    for sample in range(0, batch_size, samples):
        for head in range(0, kv_heads, heads):
            kv = slice(head, min(head + heads, kv_heads))
            yield Slab(
                slice(sample, sample + samples),
                slice(kv.start * group, kv.stop * group),
                kv,
                tokens,
            )


def forward(feature_map: FeatureMap, call: Call) -> tuple[Tensor, Tensor | None, list[Past]]:
    """The forward pass.

    Returns A·v; what its rows were divided by, (batch, heads, query_length, 1), or None where rows
    are not normalised; and the sums over the keys of each slab.
    """
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
    divisors = (
        out.new_empty(*out.shape[:3], 1, dtype=accumulation_dtype(out.dtype))
        if feature_map.normalizer == "row"
        else None
    )
    pasts = []
    for slab in slabs(feature_map, call):
        part = slab.of(call)
        past = _absorbed(feature_map, part, slab.tokens)
        sums = read_sums(feature_map, past.sums)
        for start in range(0, part.query_length, slab.tokens):
            here = slice(start, start + slab.tokens)
            rows = part.select(queries=here)
            _, divided_by = read(feature_map, rows, sums, slab.queries(out)[:, :, here])
            if divisors is not None and divided_by is not None:
                slab.queries(divisors)[:, :, here] = divided_by
        pasts.append(past)
    return out, divisors, pasts


def _absorbed(feature_map: FeatureMap, part: Call, tokens: int) -> Past:
    """The sums over the keys of a slab.

    A log_scale keeps large keys in floating range, and costs time. So the sums are first made
    without one; if their normalisers show that all stayed in range, they are kept. Looking at the
    normalisers is cheap, since they are few and the keys many.
    """
    unscaled = feature_map.unscaled
    if unscaled is not None and can_look(part.k):
        past = absorb(unscaled, part.k, part.v, part.key_mask, None, tokens)
        if unscaled.in_range(past.sums[..., -1]):
            return past
    return absorb(feature_map, part.k, part.v, part.key_mask, None, tokens)


@dataclass(frozen=True)
class Rows:
    """The gradient of the output, and what is needed to go back through the normalisation of rows.

    gradient: (batch, heads, query_length, value_dim)
    out: the output, of the same shape; None where rows are not normalised
    divisor: (batch, heads, query_length, 1), what each row was divided by; None as for `out`
    """

    gradient: Tensor
    out: Tensor | None
    divisor: Tensor | None

    def of(self, here: slice) -> tuple[Tensor, Tensor | None]:
        """Gradients of the rows before division, and of what they were divided by (None if they
        were not).

        here: which rows
        """
        gradient = self.gradient[:, :, here].to(accumulation_dtype(self.gradient.dtype))
        if self.out is None or self.divisor is None:
            return gradient, None
        numerator = gradient / self.divisor[:, :, here]
        return numerator, (numerator * self.out[:, :, here]).sum(-1, keepdim=True).neg_()

    def slab(self, slab: Slab) -> Rows:
        out, divisor = (None if x is None else slab.queries(x) for x in (self.out, self.divisor))
        return Rows(slab.queries(self.gradient), out, divisor)


def backward(
    feature_map: FeatureMap, call: Call, rows: Rows, pasts: Sequence[Past | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: first what the rows send to the sums, then what the sums send to the
    keys and values.

    rows: the gradient of the output
    pasts: the sums over the keys of each slab, as `forward` returned them
    """
    d_q, d_k, d_v = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    for slab, past in zip(slabs(feature_map, call, pasts), pasts, strict=True):
        assert past is not None
        made_by = (
            feature_map.unscaled
            if past.log_scale is None and feature_map.unscaled is not None
            else feature_map
        )
        part, sums = slab.of(call), read_sums(made_by, past.sums)
        d_read = _backward_read(
            made_by, part, rows.slab(slab), sums, slab.queries(d_q), slab.tokens
        )
        d_sums = _through_read_sums(made_by, past.sums, sums, d_read)
        backward_absorb(made_by, part, past, d_sums, slab.keys(d_k), slab.keys(d_v), slab.tokens)
    return d_q, d_k, d_v


def _backward_read(
    feature_map: FeatureMap, part: Call, rows: Rows, sums: Tensor, d_q: Tensor, tokens: int
) -> Tensor:
    """Write the gradient of a slab's queries into d_q, and return that of the sums they read."""
    normalizes = feature_map.normalizer == "row"
    values = sums[..., :-1] if normalizes else sums
    d_values, d_normalizer = torch.zeros_like(values), torch.zeros_like(sums[..., -1:])
    for start in range(0, part.query_length, tokens):
        here = slice(start, start + tokens)
        q = of_key_heads(part.q[:, :, here], part)
        features = feature_map.query(q)
        d_numerator, d_divisor = (
            None if x is None else of_key_heads(x, part) for x in rows.of(here)
        )
        assert d_numerator is not None
        add_product_(d_values, features.mT, d_numerator)
        d_features = d_numerator @ values.mT
        if d_divisor is not None:
            add_product_(d_normalizer, features.mT, d_divisor)
            d_features.addcmul_(d_divisor, sums[..., None, :, -1])
        gradient = feature_map.query_vjp(q, features, d_features)
        d_q[:, :, here] = (
            gradient if part.group == 1 else ungrouped(gradient[:, :, None], part.group)
        )
        del features, d_features, gradient  # so that they and the next ones are never held together
    return torch.cat([d_values, d_normalizer], -1) if normalizes else d_values


def _through_read_sums(
    feature_map: FeatureMap, sums: Tensor, read: Tensor, d_read: Tensor
) -> Tensor:
    """Gradient of `sums` from d_read, the gradient of `read`, which is `read_sums` of them."""
    if feature_map.normalizer == "row":
        return d_read
    if feature_map.normalizer == "none":
        return F.pad(d_read, (0, 1))
    d_values = d_read / divisor(sums[..., -1:])
    return torch.cat([d_values, -(d_values * read).sum(-1, keepdim=True)], -1)


def backward_absorb(
    feature_map: FeatureMap,
    call: Call,
    past: Past,
    d_sums: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    tokens: int = CHUNK,
) -> None:
    """Write the gradients of keys and values that were summed by `sums.absorb`.

    call: its k and v are the keys and values, its key_mask hides the padded ones
    past: what `absorb` made of them
    d_sums: (batch, kv_heads, width, value_dim + 1), gradient of the sums
    d_k, d_v: of the shapes of k and v, where the gradients are written
    tokens: how many tokens to take at a time
    """
    for start in range(0, call.key_length, tokens):
        here = slice(start, start + tokens)
        k, v = (x[:, :, here].to(d_sums.dtype) for x in (call.k, call.v))
        mask = None if call.key_mask is None else call.key_mask[:, here]
        features, log_scale = keys_of(feature_map, k, mask)
        weights = None
        if log_scale is not None:
            assert past.log_scale is not None
            weights = weights_of(log_scale, past.log_scale)
        if feature_map.decay.fades:
            count = counted(call.key_length, call.key_mask, k.device)
            fresh, _ = feature_map.decay.of_keys(features, count)
            weights = weights if fresh is None else product(weights, fresh[:, :, 0, here])
        d_log_scale = None
        if weights is None:
            write_product(d_v[:, :, here], features, d_sums[..., :-1])
            d_features = (v @ d_sums[..., :-1].mT).add_(d_sums[..., None, :, -1])
        else:
            d_features, d_v[:, :, here], d_log_scale = through_weighted_sums(
                features, weights, v, d_sums, feature_map.scale_has_gradient
            )
        d_k[:, :, here] = feature_map.vjp(k, features, visible(d_features, mask), d_log_scale)
        del features, d_features  # so that they and the next ones are never held together


def visible(d_features: Tensor, key_mask: Tensor | None) -> Tensor:
    """The gradient of key features, (batch, kv_heads, length, width), made 0 in padded slots."""
    return (
        d_features
        if key_mask is None
        else d_features.masked_fill_(~key_mask[:, None, :, None], 0.0)
    )


def through_weighted_sums(
    features: Tensor, weights: Tensor, v: Tensor, d_sums: Tensor, of_scale: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Back through `sums.summed(features, weights, v)`.

    features, weights, v: (..., length, width), (..., length) and (..., length, value_dim)
    d_sums: (..., width, value_dim + 1), the gradient of the result
    of_scale: whether the gradient of the logarithm of weights is wanted

    Returns the gradients of features, of v and, if wanted, of the logarithm of weights.
    """
    d_values, values = features @ d_sums, with_ones(v).mul_(weights[..., None])
    d_log_weights = (values * d_values).sum(-1) if of_scale else None
    return values @ d_sums.mT, d_values[..., :-1] * weights[..., None], d_log_weights
