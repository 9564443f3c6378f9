"""Memory that an operator of torch needs on the CPU while it runs, beside its inputs and outputs."""

from __future__ import annotations

from typing import Any


def working_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> int:
    return 0
