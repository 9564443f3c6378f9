"""Memory that a call of a module takes, forward and backward, found without computing it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from attnzoo.call import UnsupportedError
from attnzoo.cost.memory.allocations import Allocations, address_of, storage_of
from attnzoo.cost.memory.placeholders import StandIns, like
from attnzoo.integrations.wrappers import called_by


@dataclass(frozen=True)
class Memory:
    """Bytes that one call of a module takes on the CPU, beside its inputs and its parameters.

    kept_bytes: what is held after the forward for the backward pass, each storage once: inputs and
        outputs where autograd holds them, parameters and buffers never.
    peak_bytes_forward: the most that is allocated at any moment of a forward without gradients, the
        output included.
    peak_bytes_training: the same of a forward and its backward pass, the output and the gradients
        of inputs and parameters included.
    """

    kept_bytes: int
    peak_bytes_forward: int
    peak_bytes_training: int


def memory(module: nn.Module, /, *inputs: Any, **kwargs: Any) -> Memory:
    """Memory of `module(*inputs, **kwargs)`, found by running it on tensors without values.

    module: any; of a wrapper that adds nothing (DDP, torch.compile) what it wraps is followed.
        Hooks are left out but for those of torch and attnzoo.
    inputs: tensors, also of the meta device, or shapes (tuples of integers), which stand for
        tensors of the parameters' dtype (torch's default where there are none). Floating ones take
        gradients.
    kwargs: the same without shapes; a tensor takes a gradient where it requires one.
    returns: kept and peak bytes
    raises: UnsupportedError where an operator's sizes depend on values, where values leave torch
        (`numpy`, `tolist`), and where torch holds tensors inside one operator (nn.LSTM, its fused
        encoder layer and attention in evaluation mode without gradients): measure these with
        attnzoo.benchmarking.peak_bytes. ValueError on what is no module, and on inputs that the
        module cannot be called with.

    Floating tensors have no values. Where Python asks for one all the same, it is 1, and none is
    masked or infinite: a module whose sizes or branches depend on values is followed for these
    alone. What is followed is what this machine's CPU runs, by torch.get_num_threads() threads.
    Where a module writes in place to a view, the peak of a backward pass may be one copy of it
    higher.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"memory takes a torch.nn.Module; got {type(module).__name__}: wrap a function in a "
            "module"
        )
    call = _Call(called_by(module), inputs, kwargs)
    with torch.random.fork_rng(devices=[]), _refusals(call.name, inputs):
        forward = call.forward_peak()
        kept, training = call.kept_and_training_peak()
    return Memory(kept, forward, training)


def kept_bytes(module: nn.Module, /, *inputs: Any, **kwargs: Any) -> int:
    """`memory(...).kept_bytes` alone, for which the backward pass is not run."""
    call = _Call(called_by(module), inputs, kwargs)
    with torch.random.fork_rng(devices=[]), _refusals(call.name, inputs):
        return call.kept()


class _Place:
    """What autograd holds in a tensor's place, alive for as long as it holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Call:
    """A call of a module, in tensors without values."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _check_arguments(module, inputs, kwargs)
        stand_ins = StandIns()
        self.module = stand_ins.module(module)
        first = next((x for x in module.parameters() if x.is_floating_point()), None)
        dtype = torch.get_default_dtype() if first is None else first.dtype
        self.inputs = stand_ins.positional(inputs, dtype)
        self.kwargs = stand_ins.named(kwargs)
        self.name = type(module).__name__

    def forward_peak(self) -> int:
        with torch.no_grad(), Allocations() as allocations:
            found = self.module(*self.inputs, **self.kwargs)
        del found
        return allocations.peak

    def kept(self) -> int:
        with torch.enable_grad(), Allocations() as allocations:
            return self._recorded(allocations)[1]

    def kept_and_training_peak(self) -> tuple[int, int]:
        with torch.enable_grad(), Allocations() as allocations:
            outputs, kept = self._recorded(allocations)
            upstream = [like(x) for x in outputs]
            torch.autograd.backward(outputs, upstream)
        return kept, allocations.peak

    def _recorded(self, allocations: Allocations) -> tuple[list[Tensor], int]:
        """The outputs that take gradients, and what is kept for them."""
        places: weakref.WeakSet[_Place] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Place:
            place = _Place(tensor)
            places.add(place)
            return place

        with saved_tensors_hooks(pack, lambda place: place.tensor):
            found = self.module(*self.inputs, **self.kwargs)
        tensors = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        kept = allocations.alive()  # what a function that is called again holds is among these
        for output in tensors:
            kept.pop(address_of(output), None)
        for place in places:
            kept[address_of(place.tensor)] = storage_of(place.tensor).nbytes()
        for own in (*self.module.parameters(), *self.module.buffers()):
            kept.pop(address_of(own), None)
        return [x for x in tensors if x.requires_grad], sum(kept.values())


def _check_arguments(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError where these are no arguments of the module's forward."""
    for place, x in enumerate(inputs):
        numbers = isinstance(x, list) and bool(x) and all(type(size) is int for size in x)
        if isinstance(x, str) or numbers:
            raise ValueError(
                f"input {place} is {x!r}; give a tensor, or a shape as a tuple such as (4, 8, 64)"
            )
    try:
        signature(module.forward).bind(*inputs, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__} cannot be called with {len(inputs)} inputs and "
            f"{len(kwargs)} keyword arguments ({error}); give what its forward takes, a tensor or "
            "a shape for each"
        ) from None


#: What torch says where a tensor's values are asked for outside of it.
LEAVING = ("not supported for tensor subclasses", "got Placeholder")


@contextmanager
def _refusals(name: str, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Errors of torch, inside, as refusals of one sentence.

    name: of the module
    inputs: of the call
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        leaves = any(words in str(error) for words in LEAVING)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(" (")[0].split(". ")[0].rstrip(".")
        if not leaves and not isinstance(error, NotImplementedError):
            shapes = tree_map_only(Tensor, lambda x: tuple(x.shape), inputs)
            given = ", ".join(map(str, shapes))
            raise ValueError(
                f"{name} fails on inputs of shapes {given}: {reason}; give what its forward takes"
            ) from error
        raise UnsupportedError(
            f"{name} cannot be followed without values: {reason}. Measure it instead, with "
            "attnzoo.benchmarking.peak_bytes"
        ) from error
