"""The attention of a swapped model set on the fly: `set_attn_implementation` leads past the swap,
and back to it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

#: No "/" (a kernel of the hub) and no "flash" in this name: transformers would read a meaning into
#: them.
IMPLEMENTATION = "attnzoo"
#: Attribute of the parts of a swapped model that hold a swapped layer: their `Choice`.
CHOICE = "attnzoo_choice"


@dataclass
class Choice:
    """Which implementation was chosen by `set_attn_implementation`, for parts that share a config.

    A config that names another was changed by somebody else, such as another model made of it.

    can_follow: whether the modules can run another while they are swapped; `changed_families`
    cannot.
    """

    can_follow: bool
    name: str = IMPLEMENTATION


def give_choices(parts: list[Any], can_follow: bool) -> None:
    """Let these parts of a model keep what is chosen for them."""
    by_config: dict[int, Choice] = {}
    for part in parts:
        setattr(part, CHOICE, by_config.setdefault(id(part.config), Choice(can_follow)))


def take_choices(model: Any) -> None:
    """Undo `give_choices`."""
    for part in model.modules():
        vars(part).pop(CHOICE, None)


def runs_its_swap(part: Any) -> bool:
    """Whether a part is to run its swapped attentions, and not another that its caller has chosen.

    Raises ValueError where its config names one that was not chosen.
    """
    choice, named = getattr(part, CHOICE), part.config._attn_implementation
    if named != choice.name:
        without = f", or with {named!r} to run without it" if choice.can_follow else ""
        raise ValueError(
            f"the config of this swapped {type(part).__name__} was set to the attention "
            f"implementation {named!r}, which passes its swap by; call attnzoo.unswap(model), or "
            f"model.set_attn_implementation({IMPLEMENTATION!r}) to run the swap{without}"
        )
    return choice.name == IMPLEMENTATION


def holds_running_swap(model: Any) -> bool:
    """Whether any part of a model is to run its swapped attentions."""
    choices = [vars(part).get(CHOICE) for part in model.modules()]
    return any(choice is not None and choice.name == IMPLEMENTATION for choice in choices)


def watch_choices() -> None:
    """Let `set_attn_implementation` tell the swapped parts of a model what was chosen for them."""
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    choose = base.set_attn_implementation
    if hasattr(choose, CHOICE):
        return

    @functools.wraps(choose)
    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        choose(self, *args, **kwargs)
        for part in self.modules():
            choice = vars(part).get(CHOICE)
            if choice is not None and choice.can_follow:
                choice.name = str(part.config._attn_implementation)

    setattr(set_attn_implementation, CHOICE, True)
    base.set_attn_implementation = set_attn_implementation
