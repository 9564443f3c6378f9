"""Computing a result piece by piece: how much at a time, and joining the pieces."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnzoo.eager import is_recorded


def at_a_time(parts: int, numbers: int, limit: int, like: Tensor) -> int:
    """How many equal parts to compute together: as many as stay under a limit on a CPU, and all of
    them elsewhere and in a recorded graph, which a loop would only make longer.

    parts: number of parts
    numbers: how many numbers a part has
    limit: how many numbers the parts computed together may have
    like: a tensor on the device of the computation
    """
    if like.device.type != "cpu" or is_recorded():
        return parts
    return max(1, min(parts, limit // max(1, numbers)))  # an empty batch has 0 numbers


def samples_at_a_time(batch_size: int) -> list[slice]:
    """Which samples to compute together: one at a time, so that copies made for it are freed soon;
    in a recorded graph all of them, so that one graph serves any batch size."""
    return (
        [slice(None)]
        if is_recorded()
        else [slice(sample, sample + 1) for sample in range(batch_size)]
    )


def mask_of_heads(mask: Tensor, kv_heads: int) -> Tensor:
    """A mask for tensors whose first dimension is samples and heads together.

    mask: (samples, parts, rows, keys), of the samples that `samples_at_a_time` takes together
    kv_heads: number of heads

    Returns (samples · kv_heads, parts, rows, keys) in a recorded graph; elsewhere the mask itself,
    which is of one sample and is broadcast over its heads.
    """
    return mask[:, None].expand(-1, kv_heads, -1, -1, -1).flatten(0, 1) if is_recorded() else mask


def join(pieces: Iterable[Tensor], length: int, dim: int, *, like: Tensor | None = None) -> Tensor:
    """Join pieces along a dimension, as torch.cat does.

    Where no gradient will be asked for, each piece is written to its place as soon as it is
    computed, so that no second copy of the result is held; if the first piece has the whole
    length, it is returned, and `pieces` is not advanced further.

    pieces: tensors that fill the length in order, of equal sizes in the other dimensions
    length: size of the result along `dim`
    dim: the dimension
    like: (batch, heads, ...), a tensor after which samples and heads are laid out in memory: where
        each head holds its samples, as it does the pieces of a packed row, so does the result
    """
    if torch.is_grad_enabled() or is_recorded():
        found = list(pieces)
        return torch.cat(found, dim) if len(found) > 1 else found[0]
    out, start = None, 0
    for piece in pieces:
        if piece.shape[dim] == length:
            return piece
        if out is None:
            sizes = list(piece.shape)
            sizes[dim] = length
            if like is not None and like.stride(0) < like.stride(1):
                out = piece.new_empty(sizes[1], sizes[0], *sizes[2:]).transpose(0, 1)
            else:
                out = piece.new_empty(sizes)
        out.narrow(dim, start, piece.shape[dim]).copy_(piece)
        start += piece.shape[dim]
    assert out is not None and start == length
    return out
