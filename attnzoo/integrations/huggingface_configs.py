"""The configs of a Hugging Face model: the attention implementation that they name, and what a
saved one tells of a swap."""

from __future__ import annotations

import weakref
from typing import Any

#: No "/" (a kernel of the hub) and no "flash" in this name: transformers would read a meaning into
#: them.
IMPLEMENTATION = "attnzoo"
#: Where a config tells which models that share it are swapped: a list of entries, saved with it as
#: plain data.
ENTRIES = "attnzoo_swaps"

#: An entry, and the config that it stands in.
Claim = tuple[Any, dict[str, Any]]


def configs_of(model: Any) -> list[Any]:
    """Every config in the model, each once."""
    from transformers import PreTrainedModel

    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting.extend(getattr(config, key, None) for key in config.sub_configs)
    return list(found.values())


def claim(model: Any, layers: dict[int, str]) -> list[Claim]:
    """Enter a swap into every config of the model; `release` takes the entries out again, and so
    does the end of the model.

    layers: the names of the attentions. Parts of a model, and models built from one config, share
    it: it goes by the zoo's implementation until the last of them has released it.
    """
    claims: list[Claim] = []
    for config in configs_of(model):
        entries = _entries(config)
        before = entries[0]["attn_implementation"] if entries else config._attn_implementation_internal
        names = {str(layer): name for layer, name in layers.items()}
        entry = {"model": type(model).__name__, "attn_implementation": before, "layers": names}
        setattr(config, ENTRIES, [*entries, entry])
        claims.append((config, entry))
    weakref.finalize(model, release, claims).atexit = False
    return claims


def release(claims: list[Claim]) -> None:
    """Take the entries out, and give a config that has no other its own implementation back; once
    is enough."""
    for config, entry in claims:
        entries = getattr(config, ENTRIES, [])
        left = [other for other in entries if other is not entry]
        if len(left) == len(entries):
            continue
        if left:
            setattr(config, ENTRIES, left)
        else:
            delattr(config, ENTRIES)
            config._attn_implementation_internal = entry["attn_implementation"]


def swaps_told_of(model: Any) -> list[dict[str, Any]]:
    """The entries that a model's configs were saved with, each once."""
    told: list[dict[str, Any]] = []
    for config in configs_of(model):
        told.extend(entry for entry in getattr(config, ENTRIES, []) if entry not in told)
    return told


def _entries(config: Any) -> list[dict[str, Any]]:
    """The swaps that a config is part of now: what it was saved with counts no more."""
    return getattr(config, ENTRIES, []) if config._attn_implementation_internal == IMPLEMENTATION else []
