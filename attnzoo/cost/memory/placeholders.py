"""Tensors on the CPU with sizes and strides and no values, in the place of a call's own."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

CPU, META = torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
RESHAPING = {  # in place, to other sizes
    aten.resize_.default,
    aten.set_.source_Tensor,
    aten.t_.default,
    aten.transpose_.default,
    aten.squeeze_.default,
    aten.unsqueeze_.default,
    aten.as_strided_.default,
}


class Placeholder(Tensor):
    """A tensor of the meta device, `sizes`, that says it is on the CPU: every question but that for
    its values is answered as there, so that the same is computed."""

    sizes: Tensor

    @staticmethod
    def __new__(cls, sizes: Tensor) -> Placeholder:
        self: Placeholder = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            sizes.shape,
            strides=sizes.stride(),
            storage_offset=sizes.storage_offset(),
            dtype=sizes.dtype,
            device=CPU,
        )
        self.sizes = sizes
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:  # pyright: ignore
        return f"Placeholder({tuple(self.shape)}, dtype={self.dtype})"


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator on placeholders, and on tensors with values beside them: what comes out has
    none."""
    if _is_in_place(func):
        return args[0]
    given: dict[int, Tensor] = {}
    on_meta = [_on_meta(x, given) for x in args]
    named = {name: _on_meta(x, given) for name, x in kwargs.items() if name != "pin_memory"}
    return _on_cpu(_sized(func, on_meta, named), given)


@cache
def _is_in_place(func: Any) -> bool:
    """Whether it writes to its first argument and changes no size."""
    name = func._schema.name
    return name.endswith("_") and not name.endswith("__") and func not in RESHAPING


def _on_meta(x: Any, given: dict[int, Tensor]) -> Any:
    """An argument with the sizes of its tensors, which are noted in `given`."""
    if isinstance(x, Placeholder):
        given[id(x.sizes)] = x
        return x.sizes
    if isinstance(x, Tensor):
        sizes = x.to("meta")
        given[id(sizes)] = x
        return sizes
    if isinstance(x, (list, tuple)):
        return type(x)([_on_meta(one, given) for one in x])
    return META if isinstance(x, torch.device) else x


def _on_cpu(x: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return given[id(x)] if id(x) in given else Placeholder(x)
    return type(x)([_on_cpu(one, given) for one in x]) if isinstance(x, (list, tuple)) else x


_LAYOUTS: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = {}


def _sized(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """func on the meta device. The layouts of new tensors are remembered: some operators take long
    to find them."""
    if _may_alias(func):
        return func(*args, **kwargs)
    key = (func, _key(args), _key(tuple(kwargs.items())))
    if key in _LAYOUTS:
        shape, stride, dtype = _LAYOUTS[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)
    found = func(*args, **kwargs)
    if isinstance(found, Tensor) and not _shares_storage(found, args):
        if len(_LAYOUTS) > 4096:
            _LAYOUTS.clear()
        _LAYOUTS[key] = found.shape, found.stride(), found.dtype
    return found


@cache
def _may_alias(func: Any) -> bool:
    return func.is_view or func._schema.is_mutable


def _shares_storage(found: Tensor, args: list[Any]) -> bool:
    """Whether it is a view of an argument, as `_unsafe_view` gives without saying so."""
    address = found.untyped_storage()._cdata
    return any(isinstance(x, Tensor) and x.untyped_storage()._cdata == address for x in args)


def _key(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple([_key(one) for one in x]) if isinstance(x, (list, tuple)) else (type(x), x)


#: Attributes of a module that hold the hooks of a call.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _is_users(hook: Any) -> bool:
    """Whether a hook is neither torch's nor attnzoo's own, which change what is computed."""
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__module__", None) or type(hook).__module__
    return owner.split(".")[0] not in ("torch", "attnzoo")


class StandIns:
    """Placeholders for a module's parameters and a call's inputs. Nothing of the caller's is
    changed."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def module(self, module: nn.Module) -> nn.Module:
        """A copy whose floating parameters and buffers have no values, and which calls no hook of
        the user's. Integers and bools keep their values: they are indices and masks, which decide
        what is computed."""
        replaced: dict[int, Any] = {}
        for parameter in module.parameters():
            replaced[id(parameter)] = nn.Parameter(like(parameter), parameter.requires_grad)
        for buffer in module.buffers():
            replaced[id(buffer)] = _without_values(buffer)
        copied = copy.deepcopy(module, replaced)
        for part in copied.modules():
            for name in HOOKS:
                hooks = vars(part).get(name) or {}
                for key in [key for key, hook in hooks.items() if _is_users(hook)]:
                    del hooks[key]
        return copied

    def positional(self, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        """Shapes as tensors of this dtype; floating tensors take gradients."""
        made = [torch.empty(x, dtype=dtype, device="meta") if is_shape(x) else x for x in inputs]
        return tuple(
            tree_map_only(
                Tensor, lambda x: self._argument(x, x.requires_grad or x.is_floating_point()), made
            )
        )

    def named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Tensors that take a gradient where they did."""
        return tree_map_only(Tensor, lambda x: self._argument(x, x.requires_grad), kwargs)

    def _argument(self, x: Tensor, requires_grad: bool) -> Tensor:
        """One stands for every place of the same tensor: a module may ask whether its query is its
        key."""
        if id(x) not in self._made:
            self._made[id(x)] = _without_values(x).requires_grad_(requires_grad)
        return self._made[id(x)]


def is_shape(x: object) -> bool:
    """Whether x is a tuple of integers."""
    return isinstance(x, tuple) and bool(x) and all(type(size) is int for size in x)


def like(x: Tensor) -> Placeholder:
    """As large as x and laid out as it is; nobody who follows allocations sees it."""
    with _disable_current_modes():
        return Placeholder(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))


def _without_values(x: Tensor) -> Tensor:
    if x.is_meta or x.is_floating_point() or x.is_complex():
        return like(x)
    return x.detach().to("cpu", copy=True)
