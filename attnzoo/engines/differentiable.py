"""Gradients of what a fused kernel or a Function of our own computed, where they are to be
differentiated again or come in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.eager import is_batched, openly

Compute = Callable[..., Tensor]


def is_followed(gradient: Tensor) -> bool:
    """In a backward pass: whether more than numbers is wanted of it (create_graph,
    is_grads_batched)."""
    return torch.is_grad_enabled() or is_batched(gradient)


def open_gradients(
    compute: Compute, inputs: Sequence[Tensor | None], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of inputs from that of `compute(*inputs)`, which is computed once more, in
    operators that autograd can follow."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), openly(), without_autocast(gradient.device):
        # New nodes: two inputs may be one tensor, or one a function of the other.
        apart = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x in apart if x is not None and x.requires_grad]
        found = iter(
            torch.autograd.grad(
                compute(*apart),
                wanted,
                gradient,
                create_graph=again,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        return tuple(next(found) if x is not None and x.requires_grad else None for x in apart)


def followed(out: Tensor, compute: Compute, *inputs: Tensor | None) -> Tensor:
    """`out`, the result of a kernel without a second derivative, which is that of
    `compute(*inputs)`, as open operators give it."""
    return _Followed.apply(out, compute, *inputs)


class _Followed(torch.autograd.Function):
    """Hands the gradient on to the kernel, or past it to its inputs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, compute: Compute, *inputs: Tensor | None) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not torch.is_grad_enabled():
            return gradient, None, *(None for _ in ctx.saved_tensors)
        return None, None, *open_gradients(ctx.compute, ctx.saved_tensors, gradient)
