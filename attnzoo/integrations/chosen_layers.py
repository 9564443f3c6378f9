"""Which layers of a model get which attention, as the user of `swap` says it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from attnzoo.call import UnsupportedError
from attnzoo.integrations.places import Site
from attnzoo.registry import Choice

#: name of an attention, or (name, options), for a range of layers: {"0-3": "sliding_window", 4:
#: ("performer", {"num_features": 64})}.
Mix = Mapping[Any, Any]


Layers = int | str | Iterable[int | str]


def choose(
    name: str | Mix, layers: Layers | None, options: dict[str, Any], sites: list[Site]
) -> tuple[list[Site], dict[int, Choice]]:
    """The layers, and the choice for each of them by its place there; a layer that is not named
    keeps its own attention.

    The layers are the self-attentions of `sites` in their order, and then what else was named, by
    its path.

    Raises ValueError on a layer that the model does not have, one named twice, a malformed mapping,
    and options in the place of layers; UnsupportedError where every layer is meant and it is not
    known which are.
    """
    numbered = [site for site in sites if site.is_self]
    ordered = numbered + [site for site in sites if not site.is_self]
    choices: dict[int, Choice] = {}
    if isinstance(name, str):
        if isinstance(layers, Mapping):
            raise ValueError(
                f"layers={layers!r} is a mapping; give options by name: attnzoo.swap(model, "
                f"{name!r}, {_by_name(layers)})"
            )
        if layers is None:
            _refuse_unknown(ordered)
        chosen = (
            range(len(numbered))
            if layers is None
            else _parse("layers=", layers, ordered, len(numbered))
        )
        choices = {layer: Choice(name, dict(options)) for layer in chosen}
    else:
        if not isinstance(name, Mapping) or not name:
            raise ValueError(
                f"name={name!r} must be the name of an attention, or a mapping such as {{'0-3': "
                f"'sliding_window', '4': 'standard'}}"
            )
        if layers is not None:
            raise ValueError("layers goes with one name; a mapping names its layers itself")
        for key, value in name.items():
            for layer in _parse("the mapping's key ", key, ordered, len(numbered)):
                if layer in choices:
                    raise ValueError(
                        f"layer {layer} is named twice in {dict(name)!r}; name it once"
                    )
                choices[layer] = _choice(value, options)
    kept = [layer for layer in range(len(ordered)) if layer < len(numbered) or layer in choices]
    return [ordered[layer] for layer in kept], {
        place: choices[layer] for place, layer in enumerate(kept) if layer in choices
    }


def parse_layers(layers: Layers, paths: list[str]) -> list[int]:
    """Places of layers among all that have these paths. Raises ValueError on others."""
    sites = [Site(path, nn.Identity(), 1, 1) for path in paths]
    return _parse("layers=", layers, sites, len(sites))


def _refuse_unknown(sites: list[Site]) -> None:
    """Raise UnsupportedError where not every attention is known to look at itself or at another
    sequence, or where none looks at itself."""
    unknown = [site for site in sites if site.is_self is None]
    if unknown:
        raise UnsupportedError(
            f"{' and '.join(site.path for site in unknown)}: attnzoo could not find out by trying "
            "whether this is self-attention or looks at another "
            f"sequence; say what to swap: layers={[site.path for site in unknown]!r}, or the "
            "numbers or paths of the others"
        )
    if not any(site.is_self for site in sites):
        raise UnsupportedError(
            f"{' and '.join(site.path for site in sites)} looks at another sequence, and by itself "
            "a swap takes self-attention only; "
            f"to swap it all the same name it: layers={[site.path for site in sites]!r}"
        )


def _choice(value: Any, options: dict[str, Any]) -> Choice:
    if isinstance(value, str):
        return Choice(value, dict(options))
    if isinstance(value, Choice):
        return Choice(value.name, {**options, **value.options})
    if (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], Mapping)
    ):
        return Choice(value[0], {**options, **value[1]})
    raise ValueError(
        f"{value!r} must be the name of an attention or a pair of its name and its options"
    )


def _by_name(options: Mapping[Any, Any]) -> str:
    """{"window": 3} as window=3."""
    return ", ".join(f"{option}={value!r}" for option, value in options.items()) or "..."


def _parse(what: str, layers: Any, sites: list[Site], count: int) -> list[int]:
    """Indices of sites, in order, from 3, [0, 2], "4", "0-3" or "0-3,6", which count the first
    `count`; and from paths, or patterns of paths."""
    parts = (
        layers.split(",")
        if isinstance(layers, str)
        else list(layers)
        if isinstance(layers, Iterable)
        else [layers]
    )
    found = [_indices(part, sites, count) for part in parts]
    indices = sorted(index for some in found for index in some)
    if not found or not all(found) or len(set(indices)) < len(indices):
        has = (
            f"it has {count} attention layers, 0 to {count - 1}"
            if count
            else "none of its attentions is known to be self-attention"
        )
        others = "".join(f", {site.path}" for site in sites[count:])
        raise ValueError(
            f"{what}{layers!r} must be distinct layers of the model, such as 4, '0-3' or '0-3,6'; "
            f"{has}"
            f"{f', and those that are named by their paths{others}' if others else ''}"
        )
    return indices


def _indices(layer: Any, sites: list[Site], count: int) -> list[int]:
    """Of one layer, a range, a path or a pattern of paths; empty where the model has none such."""
    if isinstance(layer, int):
        return [layer] if not isinstance(layer, bool) and 0 <= layer < count else []
    if not isinstance(layer, str):
        return []
    numbers = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", layer)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first <= last < count:
            return list(range(first, last + 1))
    return [index for index, site in enumerate(sites) if fnmatchcase(site.path, layer.strip())]
