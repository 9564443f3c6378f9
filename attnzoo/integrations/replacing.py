"""Giving attention modules another forward in place: hooks, attributes, wrappers and adapters stay
on the module, in the swap and when it is undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

from torch import nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.places import Site
from attnzoo.integrations.undo import Undo

#: Where in a module that has another forward the zoo's attention lives.
CORE = "attention"


#: By path at the time of the swap: a module, its own class, and the kind that it became, see
#: `class_over`.
Swapped = dict[str, tuple[nn.Module, type, type]]


def replace_forwards(
    sites: list[Site],
    attentions: dict[int, Attention],
    kind: type,
    check: Callable[[nn.Module, Attention], None],
    take: Callable[[Any, Attention, str], None],
) -> Undo:
    """Make every chosen layer's module one of `kind`.

    check: raises UnsupportedError where a module and its attention do not fit; nothing is changed
    then.
    take: gives a module of that class its attention; the third argument says where it is.
    Returns what gives the modules their own classes back; everything else on them stays as it is.
    """
    places = {layer: f"layer {layer} ({sites[layer].path})" for layer in attentions}
    for layer, attention in attentions.items():
        try:
            check(sites[layer].module, attention)
            for name in (CORE, "__module__"):
                if hasattr(sites[layer].module, name) and (
                    name == CORE or name in vars(sites[layer].module)
                ):
                    raise UnsupportedError(
                        f"{type(sites[layer].module).__name__} has an attribute {name!r}, the name "
                        "of what a swap adds; rename it"
                    )
        except UnsupportedError as error:
            raise UnsupportedError(f"{places[layer]}: {error}") from None
    swapped: Swapped = {}
    for layer, attention in attentions.items():
        module = sites[layer].module
        swapped[sites[layer].path] = (module, type(module), kind)
        change_class(module, class_over(kind, type(module)))
        take(module, attention, places[layer])
    return Undo([partial(check_classes, swapped)], [partial(_give_classes_back, swapped)])


def check_classes(swapped: Swapped, model: nn.Module) -> None:
    """Raise ValueError where something that was put on a module since would not outlive the
    undoing."""
    for path, (module, own, kind) in swapped.items():
        if type(module) is not class_over(kind, own):
            raise ValueError(
                f"{path} is a {type(module).__name__} now, made of the {kind.__name__} that "
                "swap put there (a parametrization?); "
                "undo that first, as with torch.nn.utils.parametrize.remove_parametrizations"
            )
        if has_other_forward(module):
            raise ValueError(
                f"{path} was given a forward of its own since the swap; delete that attribute "
                "of the module first"
            )


def _give_classes_back(swapped: Swapped, model: nn.Module) -> None:
    for module, own, _ in swapped.values():
        delattr(module, CORE)
        vars(module).pop("__module__", None)
        change_class(module, own)


def has_other_forward(module: nn.Module) -> bool:
    """Whether the module itself has a forward that hides its class's. accelerate's does not count:
    it calls the one that it found."""
    found = vars(module).get("_old_forward")
    return (
        "forward" in vars(module) and getattr(found, "__func__", None) is not type(module).forward
    )


def change_class(module: nn.Module, other: type) -> None:
    """Make a module one of another class, also where accelerate calls its forward."""
    module.__class__ = other
    if "_old_forward" in vars(module):  # accelerate's hook calls it
        vars(module)["_old_forward"] = MethodType(other.forward, module)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def class_over(kind: type, own: type) -> Any:
    """`kind` itself where it is a kind of `own`; otherwise a class that is both, first of all
    `kind`, and pickles by the two."""
    if issubclass(kind, own):
        return kind

    def reduce(self: Any, protocol: Any) -> Any:
        made = super(given, self).__reduce_ex__(protocol)
        return (_new, (kind, own), *made[2:])

    names: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    given = type(kind.__name__, (kind, own), {**names, "__reduce_ex__": reduce})
    return given


def _new(kind: type, own: type) -> Any:
    given = class_over(kind, own)
    return given.__new__(given)
