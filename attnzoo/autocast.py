"""Autocast: it chooses the dtype of an attention's inputs and of nothing inside the attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def autocast_inputs_only(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Cast floating tensors to autocast's dtype, as it does for torch's SDPA (float64 stays), and
    run the method with autocast off.

    Inside the method autocast would run every product in low precision, also those whose sums must
    be in float32.
    """

    @wraps(method)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch._C._is_any_autocast_enabled():
            return method(*args, **kwargs)
        device = next(
            (value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)),
            None,
        )
        if (
            device is None
            or not torch.amp.is_autocast_available(device)
            or not torch.is_autocast_enabled(device)
        ):
            return method(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        same: Callable[..., Result] = method
        # One tensor given twice stays one.
        cast = {id(value): _cast(value, dtype) for value in (*args, *kwargs.values())}
        with torch.autocast(device, enabled=False):
            return same(
                *[cast[id(value)] for value in args],
                **{name: cast[id(value)] for name, value in kwargs.items()},
            )

    return run


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would sum in half precision (rule 10), and a backward pass may run inside of it."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else nullcontext()
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(one, dtype) for one in value)
    is_cast = (
        isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    )
    return value.to(dtype) if is_cast else value
