"""attnzoo: attention variants behind one interface, tested against oracles, compared with exact
attention, with their cost known."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attnzoo.version import __version__ as __version__

if TYPE_CHECKING:
    from attnzoo.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A folder or file of the library, or a public name. The first imports torch and the library:
    what needs neither, such as the command line's help, does not wait for them."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    public = importlib.import_module(f"{__name__}.public")
    if not hasattr(public, name):
        close = importlib.import_module(f"{__name__}.arguments").nearest(name, public.__all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{close}")
    globals()[name] = getattr(public, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("attnzoo.public").__all__})
