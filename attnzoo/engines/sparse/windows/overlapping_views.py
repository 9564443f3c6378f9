"""Overlapping spans and slices of the keys as views, with backward passes that add up instead of
scattering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.eager import is_open
from attnzoo.engines.sparse.windows.window_plan import BLOCK


def spans_of(x: Tensor, ends: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """Overlapping spans of the length, (batch, heads, high - low, d) each, as views.

    x: (batch, heads, length, d)
    ends: (low, high) of every span
    """
    if len(ends) > 1 and x.requires_grad and torch.is_grad_enabled() and not _must_be_plain():
        return _Spans.apply(x, ends)
    return tuple(x[:, :, low:high] for low, high in ends)


def slices_of(x: Tensor, slice_length: int) -> Tensor:
    """The keys of every block of queries as views, (batch, blocks, slice_length, d).

    x: (batch, length, d), from the first key of the first slice to the last of the last
    slice_length: keys of a slice; the next one begins BLOCK keys later
    """
    return _sliced(x, slice_length) if _must_be_plain() else _Slices.apply(x, slice_length)


def _must_be_plain() -> bool:
    """Whether views have autograd's own backward pass: where it is differentiated again, and in a
    trace, which cannot hold another."""
    return is_open() or torch.jit.is_tracing()


def _sliced(x: Tensor, slice_length: int) -> Tensor:
    return x.unfold(1, slice_length, BLOCK).mT


class _Spans(torch.autograd.Function):
    """Overlapping spans of the length as views. autograd's own backward makes a gradient as long as
    the sequence for every span."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, spans: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        return tuple(x[:, :, low:high] for low, high in spans)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, tuple[tuple[int, int], ...]], output: tuple[Tensor, ...]
    ) -> None:
        ctx.shape, ctx.spans = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (low, high), gradient in zip(ctx.spans, gradients, strict=True):
            total[:, :, low:high] += gradient
        return total, None


class _Slices(torch.autograd.Function):
    """Overlapping slices of the length as views, (batch, length, d) -> (batch, blocks,
    slice_length, d).

    autograd's own backward of such a view scatters element by element; adding block-wide pieces is
    two times faster.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slice_length: int) -> Tensor:
        return _sliced(x, slice_length)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.length, ctx.slice_length = inputs[0].shape[1], inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        batch, blocks, slice_length, width = gradient.shape
        pieces = -(-slice_length // BLOCK)
        total = gradient.new_zeros(batch, (blocks + pieces - 1) * BLOCK, width)
        for piece in range(pieces):
            part = gradient[:, :, piece * BLOCK : (piece + 1) * BLOCK]
            target = total[:, piece * BLOCK : (piece + blocks) * BLOCK].unflatten(
                1, (blocks, BLOCK)
            )
            target[:, :, : part.shape[2]] += part
        return total[:, : ctx.length], None
