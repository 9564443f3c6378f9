"""What torch allocates, followed operator by operator."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.cost.memory.placeholders import Placeholder, run
from attnzoo.cost.memory.working_memory import working_bytes

CONSTANT_BYTES = 2**26  # what is larger is not computed, even where it depends on no input
FEW = 2**20  # pairs of numbers that are computed without asking how many come of them

aten = torch.ops.aten
#: What autograd makes anew where tensors are followed, and elsewhere in place.
WRITES_IN_BACKWARD = (aten.index_add.default, aten.index_put.default, aten.scatter_add.default)
#: Operators of torch that hold tensors of their own while they run, which nobody outside sees.
HIDING = (
    aten.mkldnn_rnn_layer.default,
    aten._transformer_encoder_layer_fwd.default,
    aten._native_multi_head_attention.default,
)
#: What is answered where Python looks at numbers that nobody has: that none of them is special.
ANSWERS = {aten.any.default: False, aten.all.default: True, aten.equal.default: True}


class Allocations(TorchDispatchMode):
    """Inside, the storages that operators make are followed from their birth to their death.

    held: bytes of those that are alive. peak: the most that this was at any moment, with the memory
    that operators need while they run. What depends on no placeholder, such as a table of indices,
    has values, so that Python may look at it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._overwritten: weakref.WeakSet[Any] = weakref.WeakSet()  # by what has no values

    def alive(self) -> dict[int, int]:
        """Bytes of every storage that was made inside and is alive, by its address."""
        return {address: size for address, (_, size) in self._alive.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in(args, tensors_in(kwargs.values()))
        found = self._run(func, args, kwargs, given)
        if not _makes_nothing(func):
            before = {address_of(x) for x in given}
            for x in tensors_in((found,)):
                if address_of(x) not in before:
                    self._follow(x)
        if not _is_in_place_elsewhere(func):
            self.peak = max(self.peak, self.held + working_bytes(func, args, found))
        return found

    def _run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> Any:
        unknown = any(isinstance(x, Placeholder) for x in given)
        if not unknown and not self._lost(given) and not _makes_much(func, args, kwargs, given):
            return func(*args, **kwargs)
        if func in ANSWERS:
            answer = ANSWERS[func]
            return answer if func is aten.equal.default else torch.tensor(answer)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func in HIDING:
            raise NotImplementedError(
                f"torch's operator {func} makes tensors inside that cannot be seen."
            )
        if unknown and func._schema.is_mutable:
            for x in given:
                if not isinstance(x, Placeholder):
                    self._overwritten.add(x.untyped_storage())
        return run(func, args, kwargs)

    def _lost(self, given: list[Tensor]) -> bool:
        """Whether one was overwritten by what has no values."""
        return len(self._overwritten) > 0 and any(
            x.untyped_storage() in self._overwritten for x in given
        )

    def _follow(self, x: Tensor) -> None:
        storage = storage_of(x)
        address = storage._cdata
        if address not in self._alive:
            size = storage.nbytes()
            self._alive[address] = weakref.ref(storage, self._forget(address)), size
            self.held += size

    def _forget(self, address: int) -> Callable[[weakref.ref], None]:
        def forget(_: weakref.ref) -> None:
            self.held -= self._alive.pop(address)[1]

        return forget


def tensors_in(values: Iterable[Any], found: list[Tensor] | None = None) -> list[Tensor]:
    """Those among the values, and in the lists among them, after those `found` before."""
    found = [] if found is None else found
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            tensors_in(x, found)
    return found


@cache
def _makes_nothing(func: Any) -> bool:
    """Whether all that comes out of it was there before: views, and what it writes to."""
    return all(x.alias_info is not None for x in func._schema.returns)


def _is_in_place_elsewhere(func: Any) -> bool:
    """Whether autograd's own formulas, which are followed here, would otherwise write to the first
    argument, which is let go."""
    if func not in WRITES_IN_BACKWARD:
        return False
    node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
    return node is not None and not isinstance(node, BackwardCFunction)


def storage_of(x: Tensor) -> Any:
    """Of a placeholder, the one that its views share."""
    return (x.sizes if isinstance(x, Placeholder) else x).untyped_storage()


def address_of(x: Tensor) -> int:
    """Of the storage, while it lives."""
    return storage_of(x)._cdata


def _makes_much(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
) -> bool:
    """Whether this would make more than is worth computing."""
    if func.is_view or (given and math.prod(x.numel() for x in given) <= FEW):
        return False
    try:
        found = run(func, args, kwargs)
    except (RuntimeError, NotImplementedError):  # its size depends on values
        return False
    return sum(x.nbytes for x in tensors_in((found,))) > CONSTANT_BYTES
