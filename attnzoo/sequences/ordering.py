"""Sorting, searching and running maxima by operators that every exporter knows: ONNX has no cummax,
no searchsorted and no stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def running_maximum(x: Tensor) -> Tensor:
    """The largest number so far along the last dimension of x; in an export in log n passes, by
    doubling."""
    if not torch.compiler.is_exporting():
        return x.cummax(-1).values
    seen = 1
    while seen < x.shape[-1]:
        x = torch.cat([x[..., :seen], torch.maximum(x[..., seen:], x[..., :-seen])], -1)
        seen *= 2
    return x


def true_first(mask: Tensor, count: int) -> Tensor:
    """Indices of `count` entries of every row of (batch, length) bool: those that are True first,
    each of both kinds in order."""
    length = mask.shape[1]
    return (
        (torch.arange(length, device=mask.device) + length * ~mask)
        .topk(count, dim=1, largest=False, sorted=True)
        .indices
    )


def search(ordered: Tensor, wanted: Tensor, *, right: bool = False) -> Tensor:
    """How many of each ascending row of (..., n) are smaller than each of (..., m), or with `right`
    not larger: int64 (..., m)."""
    if not torch.compiler.is_exporting():
        return torch.searchsorted(ordered.contiguous(), wanted.contiguous(), right=right)
    length = ordered.shape[-1]
    found, step = torch.zeros_like(wanted), 1 << int(length).bit_length() - 1
    while step:
        last = (found + step - 1).clamp(max=length - 1)
        value = ordered.gather(-1, last)
        smaller = (value <= wanted if right else value < wanted) & (found + step <= length)
        found = torch.where(smaller, found + step, found)
        step //= 2
    return found


def stable_order(x: Tensor) -> Tensor:
    """Indices that sort the last dimension of int64 (..., n), equal ones in order. What is 2**62 /
    n or more counts as equal."""
    length = x.shape[-1]
    return (x.clamp(max=2**62 // length) * length + torch.arange(length, device=x.device)).argsort(
        -1
    )
