"""Second derivatives of what a fused kernel or an autograd.Function of this library computed.

Such code has a backward pass that autograd cannot differentiate again, nor run for a batch of
gradients. Where that is asked for, the same result is computed once more in open operators: plain
ones, which autograd can follow any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.eager import is_batched, openly

Compute = Callable[..., Tensor]
#: The same of several results.
ComputeMany = Callable[..., tuple[Tensor, ...]]


def is_followed(gradient: Tensor) -> bool:
    """Whether the running backward pass will itself be differentiated (create_graph) or is given a
    batch of gradients (is_grads_batched).

    gradient: what the backward pass was given
    """
    return torch.is_grad_enabled() or is_batched(gradient)


def open_gradients(
    compute: Compute | ComputeMany,
    inputs: Sequence[Tensor | None],
    gradient: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of a function, which is computed once more in open operators.

    compute: the function
    inputs: its arguments, tensors or None
    gradient: the gradient of its result, of the result's shape; of several results, those of each

    Returns one gradient for each input; None for one that is None or needs no gradient.
    """
    again = torch.is_grad_enabled()
    sent = (gradient,) if isinstance(gradient, Tensor) else tuple(gradient)
    with torch.enable_grad(), openly(), without_autocast(sent[0].device):
        # Each input gets a view of its own, because two inputs may be the same tensor, or one may
        # be computed from the other: their gradients must not be mixed.
        apart = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x in apart if x is not None and x.requires_grad]
        results = compute(*apart)
        results = (results,) if isinstance(results, Tensor) else results
        followed = [x.requires_grad for x in results]  # of several, some may depend on nothing
        found = iter(
            torch.autograd.grad(
                [x for x, is_so in zip(results, followed, strict=True) if is_so],
                wanted,
                [x for x, is_so in zip(sent, followed, strict=True) if is_so],
                create_graph=again,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        return tuple(next(found) if x is not None and x.requires_grad else None for x in apart)


def followed(out: Tensor, compute: Compute, *inputs: Tensor | None) -> Tensor:
    """A kernel's result, made differentiable any number of times where the kernel is only once.

    out: the kernel's result
    compute: the same function, which uses open operators inside `eager.openly`
    inputs: its arguments, tensors or None

    Returns the same values. A first derivative goes through the kernel's own backward pass, and
    further ones through `compute`.
    """
    return _Followed.apply(out, compute, *inputs)


class _Followed(torch.autograd.Function):
    """Passes the gradient on to the kernel, or, where it will be differentiated again, past the
    kernel to its inputs."""

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


def recomputed(compute: Compute | ComputeMany, *inputs: Tensor | None) -> Any:
    """compute(*inputs), of which autograd keeps the inputs alone: the backward pass computes it
    again. It may be differentiated any number of times.

    compute: gives a tensor, or a tuple of them
    """
    return _Recomputed.apply(compute, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute | ComputeMany, *inputs: Any) -> Any:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        found = compute(*inputs)
        return found if isinstance(found, Tensor) else tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *open_gradients(ctx.compute, ctx.saved_tensors, gradients)
