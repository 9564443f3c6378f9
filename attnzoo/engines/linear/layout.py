"""How the linear engine lays out the tensors that it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.eager import only_autograd_looks


def grouped(x: Tensor, kv_heads: int, chunks: int) -> Tensor:
    """Bring rows together that are multiplied by the same matrix.

    The query heads of a group share one key head, so the rows of a chunk in all of them are stacked
    into one product.

    x: (batch, heads, length, y)
    kv_heads: number of key heads
    chunks: number of chunks that the length is cut into

    Returns (batch, kv_heads, chunks, group · length / chunks, y).
    """
    return x.unflatten(1, (kv_heads, -1)).unflatten(3, (chunks, -1)).transpose(2, 3).flatten(3, 4)


def ungrouped(x: Tensor, group: int) -> Tensor:
    """The inverse of `grouped`, back to (batch, heads, length, y).

    x: as `grouped` returns it
    group: query heads that share a key head
    """
    return x.unflatten(3, (group, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def with_ones(v: Tensor) -> Tensor:
    """[v, 1], (..., value_dim + 1): a weighted sum of these gives the sum of the weights, too."""
    return torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)


def add_product(x: Tensor, a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
    """x + factor · a @ b by one operator, all with the same leading dimensions."""
    found = torch.baddbmm(x.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3), alpha=factor)
    return found.view(x.shape)


def add_product_(x: Tensor, a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
    """x += factor · a @ b by one operator, x in one piece but for its first dimensions, which all
    share."""
    x.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), alpha=factor)
    return x


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether a tensor that was just made of these may be written over, since nothing else will
    read it: no autograd, no transform, and no counter of operations."""
    looked_at = torch.is_grad_enabled() or any(x.is_meta for x in tensors)
    return not looked_at and only_autograd_looks(*tensors)
