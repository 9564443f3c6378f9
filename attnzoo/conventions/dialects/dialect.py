"""A dialect: how a library calls an attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Sizes = tuple[int, int, int]  # heads, kv_heads, head_dim


class NotExpressible(Exception):
    """A dialect has no words for such a call."""


class Asked(Protocol):
    """A call in this library's layout, as `attnzoo.conformance.trial_call.Given` is one."""

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool
    key_mask: Tensor | None
    segments: Tensor | None
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Dialect:
    """How a library calls an attention.

    name: as a caller gives it
    meaning: the call in its own words
    call: calls a function so, and returns its rows in this library's layout, (batch, heads,
        query_length, value_dim). Raises `NotExpressible` on what it has no words for.
    final_state: calls a function so, and returns the state after the last token in this library's
        layout, (batch, kv_heads, width, value_dim); raises `NotExpressible` where the function
        returns none. None: the dialect has no words for it
    sizes: tells what sizes a function takes alone; raises ValueError on what cannot be called so.
        None: it takes any
    hidden_row: what a row is that sees nothing
    isolates_nan: whether what is no number reaches no row that must not see it
    roundings: how often numbers are rounded to a half-precision dtype on their way to a row
    """

    name: str
    meaning: str
    call: Callable[[Callable[..., Any], Any], Tensor]
    final_state: Callable[[Callable[..., Any], Any], Tensor] | None = None
    sizes: Callable[[Any], Sizes] | None = None
    hidden_row: Literal["0", "mean of v"] = "0"
    isolates_nan: bool = False
    roundings: int = 1
