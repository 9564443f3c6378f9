"""Checks of arguments: each returns the value or raises a ValueError that names the argument, the
value and what is allowed."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def check_set(what: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Raise a ValueError on numbers that were left on the meta device, where they have no
    values."""
    if tensor.is_meta and not like.is_meta:
        raise ValueError(
            f"{what} are on the meta device, where they have no values; call "
            f"to_empty(device={str(like.device)!r}) on this attention, "
            "or load a state_dict that has them"
        )
    return tensor


def nearest(word: Any, known: Iterable[Any]) -> str:
    """' (did you mean ...?)' when a known word is close, else ''."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_list(name: str, value: Any) -> list[Any]:
    """A list of at least one value."""
    if isinstance(value, list) and value:
        return value
    if value is None or value == []:
        raise ValueError(f"{name} is empty; list at least one value")
    raise ValueError(f"{name}={value!r} must be a list, such as [{value}]")


def check_positive(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return value


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    return value


def check_count(name: str, value: Any) -> int:
    """A whole number of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 0")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some words."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown{nearest(value, choices)}; choose one of "
            f"{', '.join(choices)}"
        )
    return value


def check_path(value: Any) -> Path:
    """The path of a file."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"path={value!r} must be the path of a file, such as 'swap.safetensors'")
    return Path(value)


def check_options(name: str, value: Any) -> dict[str, Any]:
    """Options by name; None means none."""
    if value is not None and not (
        isinstance(value, Mapping) and all(isinstance(option, str) for option in value)
    ):
        raise ValueError(
            f"{name}={value!r} must be a mapping from names to values, such as {{'window': 128}}"
        )
    return dict(value or {})


def check_max_length(variant: str, max_length: int, **lengths: int) -> None:
    """Raise on a length over the one that the variant is built for."""
    for name, length in lengths.items():
        if length > max_length:
            raise ValueError(
                f"{name}={length} is longer than max_length={max_length}; build {variant} with a "
                "larger max_length"
            )


def check_kv_heads(value: Any, heads: int) -> int:
    """A number of key-value heads that divides heads; None means as many as heads."""
    if value is None:
        return heads
    if heads % check_positive("kv_heads", value):
        raise ValueError(f"kv_heads={value} must divide heads={heads} (grouped-query attention)")
    return value


def check_seed(value: Any) -> int:
    """A whole number of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"seed={value!r} must be a whole number in [-2**63, 2**63)")
    return value


def check_dropout(value: Any) -> float:
    """A probability below 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < 1.0:
        raise ValueError(f"dropout={value!r} must be a probability in [0, 1)")
    return float(value)


def check_softcap(value: Any) -> float | None:
    """What scores are kept within, a finite number above 0; None: they are not."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(
            f"softcap={value!r} must be a finite number above 0, within which scores are kept, or "
            "None for scores as they are"
        )
    return float(value)


def check_scale(value: Any) -> float | None:
    """A finite factor of the scores; None means 1/sqrt(head_dim)."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"scale={value!r} must be a finite number, or None for 1/sqrt(head_dim)")
    return float(value)
