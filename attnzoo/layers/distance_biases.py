"""Biases by distance, as the input `distance_bias` of a call takes them.

Each is (heads, 2 · length - 1): the entry at length - 1 + (j - i) is added to the score of the
query at position i and the key at position j, so that a table for `length` tokens serves every call
of at most as many. Gradients reach what a bias is made of.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.arguments import check_positive

__all__ = ["alibi", "alibi_slopes", "clipped", "t5"]


def alibi_slopes(heads: int) -> Tensor:
    """The slope of every head, (heads,) float32: 2^(-8/heads), 2^(-16/heads), ... where heads is a
    power of 2; else those of the power below, and every other one of twice that power.

    Press et al., Train Short, Test Long, 2022, section 3, and the authors' code for other numbers
    of heads, which BLOOM and MPT follow. Raises ValueError on heads below 1.
    """
    check_positive("heads", heads)
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return torch.tensor([*slopes, *between][:heads])


def alibi(slopes: Tensor, length: int) -> Tensor:
    """-slope · |j - i|: a penalty that grows with the distance (Press et al. 2022, section 3).

    slopes: (heads,), as `alibi_slopes` gives them
    length: of the longest call, in tokens
    """
    _check(slopes, 1, "slopes", "(heads,)", length)
    return -slopes[:, None] * _offsets(length, slopes.device).abs()


def t5(weight: Tensor, length: int, *, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """T5's learned buckets: one for each near distance, and wider ones up to max_distance, behind
    which all share the last (Raffel et al. 2020, section 2.1, and the authors' code).

    weight: (buckets, heads), as `relative_attention_bias.weight` in transformers
    length: of the longest call, in tokens
    bidirectional: whether keys after the query have half of the buckets, as in an encoder; else
        they share the first, as in a decoder
    max_distance: from which distance on the last bucket serves
    """
    _check(weight, 2, "weight", "(buckets, heads)", length)
    buckets = weight.shape[0] // 2 if bidirectional else weight.shape[0]
    exact = buckets // 2
    if exact < 1 or check_positive("max_distance", max_distance) <= exact:
        raise ValueError(
            f"max_distance={max_distance} and {weight.shape[0]} buckets leave none for a range of "
            f"distances: give at least {4 if bidirectional else 2} buckets, and a max_distance "
            f"over {max(exact, 1)}"
        )
    offsets = _offsets(length, weight.device)
    distance = offsets.abs() if bidirectional else (-offsets).clamp(min=0)
    # In float32, as the code that the weights were trained with: a bucket's edge is a matter of the
    # last digit.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(distance < exact, distance, far)
    if bidirectional:
        bucket = bucket + (offsets > 0) * buckets
    return weight[bucket].T


def clipped(table: Tensor, length: int) -> Tensor:
    """A table whose last entry on each side serves all farther distances (Shaw et al. 2018, section
    3.2).

    table: (heads, 2 · reach + 1), the middle one for the query's own position
    length: of the longest call, in tokens
    """
    _check(table, 2, "table", "(heads, 2 · reach + 1)", length)
    if table.shape[1] % 2 == 0:
        raise ValueError(
            f"table has {table.shape[1]} distances; give an odd number, 2 · reach + 1, the middle "
            "one for the query's own position"
        )
    reach = table.shape[1] // 2
    return table[:, _offsets(length, table.device).clamp(-reach, reach) + reach]


def _offsets(length: int, device: torch.device) -> Tensor:
    """j - i of every entry of a table, (2 · length - 1,)."""
    return torch.arange(1 - length, length, device=device)


def _check(x: Tensor, dims: int, name: str, shape: str, length: int) -> None:
    check_positive("length", length)
    if not isinstance(x, Tensor) or x.dim() != dims or not x.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {found}; give a floating tensor of shape {shape}")
