"""Replacing a model's attention modules by others that hold the same weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.plan import Site


class PutBack:
    """Puts replaced modules back, with the parameters and the mode that their replacements have now."""

    def __init__(self) -> None:
        self.originals: dict[str, nn.Module] = {}
        self.nested: dict[str, bool] = {}

    def __call__(self, model: nn.Module) -> None:
        for path, original in self.originals.items():
            gone = [name for name, _ in original.named_parameters(recurse=False) if getattr(model.get_submodule(path), name, original) is None]
            if gone:
                raise ValueError(f"{path} has its {gone[0]} split over processes; it cannot be put back")
        for path, original in self.originals.items():
            replacement = model.get_submodule(path)
            for name, parameter in list(original.named_parameters(recurse=False)):
                setattr(original, name, getattr(replacement, name, parameter))
            original.train(replacement.training)
            set_submodule(model, path, original)
        for path, value in self.nested.items():
            model.get_submodule(path).use_nested_tensor = value  # pyright: ignore[reportArgumentType]


def replace_modules(
    model: nn.Module, sites: list[Site], attentions: dict[int, Attention], wrap: Callable[[nn.Module, Attention], nn.Module]
) -> PutBack:
    """Put wrap(module, attention) into the place, or the places, of every chosen layer's module."""
    replacements = {}
    for layer, attention in attentions.items():
        site = sites[layer]
        try:
            replacements[id(site.module)] = wrap(site.module, attention)
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {layer} ({site.path}): {error}") from None
    put_back = PutBack()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacements:
            put_back.originals[path] = module
            set_submodule(model, path, replacements[id(module)])
    return put_back


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Assign a submodule by its path, in a ModuleList too."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
