"""Whether an optional package is there, without importing it: a backend that needs it says so in
its `why_not`."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec


@lru_cache(maxsize=8)
def _found(name: str) -> bool:
    return find_spec(name) is not None


def missing(name: str, how_to_install: str) -> str | None:
    """A reason to refuse when `import name` cannot work."""
    return None if _found(name) else f"the package {name} is not installed ({how_to_install})"


# What torch.compiler.assume_constant_result sets: a compiled graph takes the answer as a constant.
missing._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
