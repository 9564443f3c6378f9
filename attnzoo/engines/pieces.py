"""Results that are computed piece by piece, laid side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def only_autograd_looks(*inputs: Tensor) -> bool:
    """Whether nothing but autograd looks into what is computed of these. An autograd.Function of our own is dark to torch.func (vmap, grad)
    and to forward-mode differentiation, which then must see plain operators."""
    return not torch._C._are_functorch_transforms_active() and all(unpack_dual(x).tangent is None for x in inputs)


def at_a_time(parts: int, numbers: int, limit: int, like: Tensor) -> int:
    """How many of `parts` equal parts to compute together, each of `numbers` numbers: on a CPU, at most `limit` numbers; all parts
    elsewhere and in a compiled graph, which a loop would only make longer."""
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return parts
    return max(1, min(parts, limit // max(1, numbers)))  # 0 numbers in an empty batch


def samples_at_a_time(batch_size: int) -> list[slice]:
    """One sample at a time, so that what is fetched for it is soon done with; in a compiled graph all together, so that it is one for any batch."""
    return [slice(None)] if torch.compiler.is_compiling() else [slice(sample, sample + 1) for sample in range(batch_size)]


def mask_of_heads(mask: Tensor, kv_heads: int) -> Tensor:
    """The mask of some samples, (samples, parts, rows, keys), for samples and heads in one dimension; that of one sample serves all heads."""
    return mask[:, None].expand(-1, kv_heads, -1, -1, -1).flatten(0, 1) if torch.compiler.is_compiling() else mask


def join(pieces: Iterable[Tensor], length: int, dim: int) -> Tensor:
    """As torch.cat of pieces that fill `length` along `dim`. Where no gradient will be asked for, each is written to its place as
    it comes, so that no second copy of the result is held. `pieces` is not asked further once the length is full."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
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
