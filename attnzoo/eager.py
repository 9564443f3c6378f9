"""Whether Python may read the values of tensors here, and whether an autograd.Function of this
library may run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

_openly: ContextVar[bool] = ContextVar("openly", default=False)
_counted: ContextVar[bool] = ContextVar("counted", default=False)


def is_recorded() -> bool:
    """Whether what runs is written down as a graph, to run again with other values: torch.compile,
    torch.export, ONNX, torch.jit.trace, torch.fx."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None


def can_look(*tensors: Tensor, may_stall: bool = False) -> bool:
    """Whether Python may read the values of these tensors, to decide by them how to go on.

    Not while a graph is recorded, not inside torch.func, not on the meta device; on CUDA only where
    waiting for the device is allowed and no stream is captured.
    may_stall: waiting for the device is allowed.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (is_recorded() and not _counted.get())
    ):
        return False
    for x in tensors:  # `any` takes twice as long, which shows in a step of decoding
        if x.is_meta or isinstance(x, FakeTensor) or is_batched(x):
            return False
        if x.is_cuda and _waits(may_stall):
            return False
    return True


def loses_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function of tensors, as `nn.Module._apply` takes it, keeps their shapes alone and
    moves them to where values are."""
    numbers = torch.arange(1.0, 9.0, device="cpu")
    moved = fn(numbers)
    return can_look(moved, may_stall=True) and not torch.equal(moved.to(numbers), numbers)


def may_branch(x: Tensor) -> bool:
    """As `can_look(x, may_stall=True)`, and true inside torch.func too: for conditions that
    `holds_anywhere` evaluates for all samples together."""
    if torch.compiler.is_compiling() or (is_recorded() and not _counted.get()):
        return False
    plain = list(_beneath(x))[-1]
    return not (
        plain.is_meta
        or isinstance(plain, FakeTensor)
        or is_batched(plain)
        or (plain.is_cuda and _waits(True))
    )


def holds_anywhere(condition: Tensor) -> bool:
    """Whether any entry of a condition is true; inside torch.func, any entry of any sample."""
    return bool(list(_beneath(condition))[-1].any())


def is_learned(x: Tensor) -> bool:
    """Whether x, or what torch.func wraps in it, requires a gradient."""
    return any(tensor.requires_grad for tensor in _beneath(x))


def _beneath(x: Tensor) -> Iterator[Tensor]:
    """x, and inside torch.func what it wraps, the plain tensor last."""
    yield x
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
        yield x


def _waits(may_stall: bool) -> bool:
    return not may_stall or torch.cuda.is_current_stream_capturing()


def is_batched(x: Tensor) -> bool:
    """Whether x is a gradient of torch.autograd.grad(..., is_grads_batched=True), which stands for
    many."""
    return torch._C._functorch.is_legacy_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def only_autograd_looks(*inputs: Tensor) -> bool:
    """Whether an autograd.Function of this library may compute with these inputs.

    Only autograd knows the derivative of such a function. Where a graph is recorded, inside
    torch.func (vmap, grad), in forward-mode differentiation and for tensors without values, plain
    operators must run.
    """
    if is_recorded() or is_open() or torch._C._are_functorch_transforms_active():
        return False
    return not any(isinstance(x, FakeTensor) for x in inputs)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, nothing is recorded into a graph: for constants, which depend on sizes and seeds
    alone."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def openly() -> AbstractContextManager[None]:
    """Inside, only operators run that can be differentiated any number of times."""
    return _set(_openly)


def only_counted() -> AbstractContextManager[None]:
    """Inside, a trace is taken to count one call, and never run with other values."""
    return _set(_counted)


@contextmanager
def _set(flag: ContextVar[bool]) -> Iterator[None]:
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def is_open() -> bool:
    """Whether this is inside `openly`, or more than one backward pass will be taken: forward-mode
    differentiation, nested transforms."""
    if torch.compiler.is_compiling():
        return False
    return (
        _openly.get()
        or forward_ad._current_level >= 0
        or (torch._C._are_functorch_transforms_active() and _differentiates_again())
    )


def _differentiates_again() -> bool:
    transforms = [one.key() for one in torch._C._functorch.get_interpreter_stack() or ()]  # pyright: ignore[reportAttributeAccessIssue]
    kinds = torch._C._functorch.TransformType  # pyright: ignore[reportAttributeAccessIssue]
    return kinds.Jvp in transforms or transforms.count(kinds.Grad) > 1


def refuse_later(out: Tensor, allowed: Tensor, message: str) -> Tensor:
    """Refuse `out` if a condition turns out False that cannot be read now.

    out: any shape, the result.
    allowed: bool, a scalar or broadcastable to out.
    message: of the RuntimeError, where a graph can raise one; elsewhere (torch.jit.trace, ONNX,
    torch.func) out becomes NaN.
    Returns out.
    """
    if out.is_meta:
        return out
    raises = torch.compiler.is_compiling() or not (
        is_recorded() or torch._C._are_functorch_transforms_active()
    )
    if raises:
        torch._assert_async(allowed, message)  # pyright: ignore[reportPrivateImportUsage]
    return (
        out
        if raises and not torch.compiler.is_exporting()
        else out.masked_fill(~allowed, float("nan"))
    )
