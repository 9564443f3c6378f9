"""The one answer to "may Python look at values here?", and to "may a Function of our own compute?",
of whose inside only autograd knows."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Whether what stands in these may decide how to go on: not in a graph that is recorded, not
    inside torch.func, not on the meta device, and on CUDA only where it may stall and no stream is
    captured."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (is_recorded() and not _counted.get())
    ):
        return False
    return not any(
        x.is_meta or isinstance(x, FakeTensor) or is_batched(x) or (x.is_cuda and _waits(may_stall))
        for x in tensors
    )


def may_branch(x: Tensor) -> bool:
    """As `can_look(x, may_stall=True)`, and inside torch.func too: for a question that
    `holds_anywhere` answers for all samples at once."""
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
    """Whether it holds anywhere; inside torch.func in any sample, so that one answer suits them
    all."""
    return bool(list(_beneath(condition))[-1].any())


def is_learned(x: Tensor) -> bool:
    """Whether a gradient may go to x, inside torch.func to what it wraps."""
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
    """Whether nothing but autograd looks into what is computed of these. An autograd.Function of
    our own is dark to a graph that is recorded, to torch.func (vmap, grad), to forward-mode
    differentiation and to tensors without values, which then must see plain operators."""
    if is_recorded() or is_open() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        forward_ad.unpack_dual(x).tangent is None and not isinstance(x, FakeTensor) for x in inputs
    )


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, nothing is recorded: for what depends on sizes and seeds alone, and is a constant of
    the graph. torch.export records by a mode."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def openly() -> AbstractContextManager[None]:
    """Inside, everything is computed in operators that can be differentiated any number of
    times."""
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
    """`out`, refused where `allowed`, a bool that nobody can look at now, turns out False: by a
    RuntimeError with this message where a graph can raise one, by NaN where assertions are lost
    (torch.jit.trace, ONNX, torch.func)."""
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
