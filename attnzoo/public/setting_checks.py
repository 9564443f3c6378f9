"""Settings that Python, YAML and the command line give alike: as they are written, and checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attnzoo.arguments import nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")
SEEDS = 2**32


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype. Raises ValueError when it is none of `DTYPES`."""
    import torch

    text = dtype_name(dtype)
    if text not in DTYPES:
        raise ValueError(
            f"dtype={text!r} is unknown{nearest(text, DTYPES)}; use one of {', '.join(DTYPES)}"
        )
    return getattr(torch, text)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Such as "float32", of that or of torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_seed(seed: int) -> None:
    """Raise ValueError on a seed that has more than 32 bits."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed={seed} is out of range; use 0 to {SEEDS - 1}")


def listed(value: Any) -> list[Any]:
    """One value, or several, as a list."""
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    return list(value) if several else [value]


def given(**settings: Any) -> dict[str, Any]:
    """The settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}
