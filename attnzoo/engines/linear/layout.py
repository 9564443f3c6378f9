"""How the linear engine lays out what it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped(x: Tensor, kv_heads: int, chunks: int) -> Tensor:
    """(batch, heads, length, y) -> (batch, kv_heads, chunks, group * length / chunks, y): rows that
    share a matrix come together."""
    return x.unflatten(1, (kv_heads, -1)).unflatten(3, (chunks, -1)).transpose(2, 3).flatten(3, 4)


def ungrouped(x: Tensor, group: int) -> Tensor:
    """Takes `grouped` back."""
    return x.unflatten(3, (group, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def with_ones(v: Tensor) -> Tensor:
    """[v, 1]: what is summed of values is summed of their weights as well."""
    return torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b by one operator, all with the same leading dimensions."""
    return torch.baddbmm(x.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3)).view(x.shape)


def add_product_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a @ b by one operator, x contiguous, all with the same leading dimensions."""
    x.view(-1, *x.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return x
