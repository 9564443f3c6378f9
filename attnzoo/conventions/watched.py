"""Who wants to see A of the attentions that run outside of any `Attention` module of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from attnzoo.eager import is_recorded

#: Takes the layer that attends, or None where that is not known, and gives A to be formed.
Watcher = Callable[[Any, Callable[[], Tensor]], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def show(layer: Any, weights: Callable[[], Tensor]) -> None:
    """Show A to whoever watches.

    layer: the module that attends; None: the one whose forward runs
    weights: forms A, (batch, heads, queries, keys), where somebody wants it
    """
    if is_recorded():  # nobody watches what runs later, and a compiler cannot ask
        return
    watcher = _watcher.get()
    if watcher is not None:
        watcher(layer, weights)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` is shown A of each layer that runs."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
