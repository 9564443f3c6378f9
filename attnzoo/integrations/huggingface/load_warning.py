"""A warning where transformers loads a model that was saved with its attention swapped:
`from_pretrained` gives exact attention."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from attnzoo.integrations.huggingface.configs import ENTRIES, swaps_told_of

MODELS = "transformers.modeling_utils"


def watch_loading() -> None:
    """Let `from_pretrained` warn, at once or when transformers is imported, which is not imported
    for it."""
    if MODELS in sys.modules:
        _wrap(sys.modules[MODELS])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Waits for transformers' models, finds them as the other finders do, and wraps what their
    module defines."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != MODELS:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: Any) -> None:
                execute(module)
                _wrap(module)

            spec.loader.exec_module = execute_and_wrap
        return spec


def _wrap(module: Any) -> None:
    base: Any = module.PreTrainedModel
    load = base.from_pretrained.__func__
    if hasattr(load, ENTRIES):
        return

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        _warn_of_swaps(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    setattr(from_pretrained, ENTRIES, True)
    base.from_pretrained = classmethod(from_pretrained)


def _warn_of_swaps(model: Any) -> None:
    for entry in swaps_told_of(model):
        names = ", ".join(dict.fromkeys(entry["layers"].values()))
        warnings.warn(
            f"this {entry['model']} was saved with its attention swapped ({names} in "
            f"{len(entry['layers'])} layers), and from_pretrained gives it "
            "exact attention: swap it again with attnzoo.load(model, path), the file that "
            "attnzoo.save wrote, or with attnzoo.swap as before; "
            f"to keep exact attention, say so in its config: del model.config.{ENTRIES}",
            stacklevel=3,  # the caller of from_pretrained
        )
