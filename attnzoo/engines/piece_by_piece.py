"""Results that are computed piece by piece, laid side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnzoo.eager import is_recorded


def at_a_time(parts: int, numbers: int, limit: int, like: Tensor) -> int:
    """How many of `parts` equal parts to compute together, each of `numbers` numbers: on a CPU, at
    most `limit` numbers; all parts elsewhere and in a recorded graph, which a loop would only make
    longer."""
    if like.device.type != "cpu" or is_recorded():
        return parts
    return max(1, min(parts, limit // max(1, numbers)))  # 0 numbers in an empty batch


def samples_at_a_time(batch_size: int) -> list[slice]:
    """One sample at a time, so that what is fetched for it is soon done with; in a recorded graph
    all together, so that it is one for any batch."""
    return (
        [slice(None)]
        if is_recorded()
        else [slice(sample, sample + 1) for sample in range(batch_size)]
    )


def mask_of_heads(mask: Tensor, kv_heads: int) -> Tensor:
    """The mask of some samples, (samples, parts, rows, keys), for samples and heads in one
    dimension; that of one sample serves all heads."""
    return mask[:, None].expand(-1, kv_heads, -1, -1, -1).flatten(0, 1) if is_recorded() else mask


def join(pieces: Iterable[Tensor], length: int, dim: int) -> Tensor:
    """As torch.cat of pieces that fill `length` along `dim`. Where no gradient will be asked for,
    each is written to its place as it comes, so that no second copy of the result is held. `pieces`
    is not asked further once the length is full."""
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
            out = piece.new_empty(sizes)
        out.narrow(dim, start, piece.shape[dim]).copy_(piece)
        start += piece.shape[dim]
    assert out is not None and start == length
    return out
