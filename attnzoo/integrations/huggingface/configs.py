"""The configs of a Hugging Face model: the attention implementation that they name, and what a
saved one tells of a swap."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from attnzoo.integrations.huggingface.attention_function import attend
from attnzoo.integrations.huggingface.choice import CHOICE, IMPLEMENTATION, watch_choices
from attnzoo.integrations.huggingface.masks.interface_masks import padding_mask

#: Where a config tells which models that share it are swapped: a list of entries, saved with it as
#: plain data.
ENTRIES = "attnzoo_swaps"

#: An entry, and the config that it stands in.
Claim = tuple[Any, dict[str, Any]]


class Registered(str):
    """`IMPLEMENTATION` in the config of a swapped model. Wherever that is unpickled (a saved model,
    a spawned worker), transformers is told of the implementation.

    models: those that are swapped and have this config. A copy of the config, which no model has
    yet, has none.
    """

    models: weakref.WeakSet[Any]

    def __new__(cls) -> Registered:
        name = super().__new__(cls, IMPLEMENTATION)
        name.models = weakref.WeakSet()
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ()


def _unpickled() -> Registered:
    register()
    return Registered()


def register() -> None:
    """Make transformers know the implementation of a swapped model by its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
    watch_choices()
    let_configs_ask_for_weights()


def let_configs_ask_for_weights() -> None:
    """Let the config of a swapped model say output_attentions=True: transformers takes it of its
    own "eager" alone, since its other implementations return no A, and this one does."""
    from transformers import PreTrainedConfig

    base: Any = PreTrainedConfig
    asked = base.output_attentions
    if hasattr(asked.fset, CHOICE):
        return

    @functools.wraps(asked.fset)
    def ask(self: Any, value: bool) -> None:
        if self._attn_implementation == IMPLEMENTATION:
            self._output_attentions = value
        else:
            asked.fset(self, value)

    setattr(ask, CHOICE, True)
    base.output_attentions = asked.setter(ask)


def let_configs_be_saved(config: Any) -> None:
    """As `let_configs_ask_for_weights`, where the config is saved: every class of configs has a
    list of what it checks then."""
    from transformers import PreTrainedConfig

    refuse: Any = PreTrainedConfig.validate_output_attentions

    @functools.wraps(refuse)
    def validate_output_attentions(self: Any) -> None:
        if self._attn_implementation != IMPLEMENTATION:
            refuse(self)

    for known in type(config).__mro__:
        validators = vars(known).get("__class_validators__", [])
        if refuse in validators:
            validators[validators.index(refuse)] = validate_output_attentions


def configs_of(model: Any) -> list[Any]:
    """Every config in the model, each once."""
    from transformers import PreTrainedModel

    waiting: list[Any] = [
        module.config for module in model.modules() if isinstance(module, PreTrainedModel)
    ]
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
        told, entries, before = (
            getattr(config, ENTRIES, []),
            _entries(config),
            config._attn_implementation_internal,
        )
        if before == IMPLEMENTATION and told:
            before = told[0]["attn_implementation"]
        let_configs_be_saved(config)
        names = {str(layer): name for layer, name in layers.items()}
        entry = {"model": type(model).__name__, "attn_implementation": before, "layers": names}
        setattr(config, ENTRIES, [*entries, entry])
        claims.append((config, entry))
    weakref.finalize(model, release, claims).atexit = False
    return claims


def mark(model: Any, claims: list[Claim]) -> None:
    """Write into the claimed configs that go by the zoo's implementation that this model is one of
    those that do."""
    for config, _ in claims:
        name = config._attn_implementation_internal
        if name == IMPLEMENTATION:
            if not isinstance(name, Registered):
                name = config._attn_implementation_internal = Registered()
            name.models.add(model)


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
    """The swaps that a config is part of now; entries that it was saved or copied with do not
    count."""
    name = config._attn_implementation_internal
    is_left_over = name != IMPLEMENTATION or (isinstance(name, Registered) and not name.models)
    return [] if is_left_over else getattr(config, ENTRIES, [])
