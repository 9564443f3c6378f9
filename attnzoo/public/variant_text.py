"""Variants as they are written: performer:num_features=64,features=hyperbolic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attnzoo.arguments import nearest
from attnzoo.packages import require
from attnzoo.registry import Choice, find, options_of

#: A variant as text, as a pair of its name and its options, or as a `Choice`.
Variant = str | tuple[str, Mapping[str, Any]] | Choice

HEADS, HEAD_DIM, LENGTH = 2, 64, 64  # of the trial build that finds bad values before any work
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
    "Sequence[int]": (list, tuple),
}


def parse_variant(text: str) -> Choice:
    """The choice that NAME[:OPTION=VALUE,...] says, values read as YAML scalars.

    The variant is built once, so that everything wrong with it is found before any work.

    Raises ValueError on an unknown name or option (with the nearest), a value of another type than
    the option's, one that the constructor refuses, and a malformed text.
    """
    name, _, rest = text.strip().partition(":")
    find(name)
    options = dict(_option(text, name, part) for part in split_options(rest))
    choice = Choice(name, options)
    check_variant(choice, text)
    return choice


def written(variants: Variant | Iterable[Variant]) -> list[str]:
    """One variant, or several, each as text that `parse_variant` reads.

    Raises ValueError on what is none, and on an option that no text says.
    """
    if isinstance(variants, str | Choice) or _is_pair(variants):
        variants = [variants]  # type: ignore[list-item]  # a pair is no iterable of variants
    if not isinstance(variants, Iterable):
        raise ValueError(f"variants={variants!r} must be a variant or a list of them")
    texts = [_written(variant) for variant in variants]
    if not texts:
        raise ValueError(
            "variants is empty; give at least one, such as 'performer:num_features=64', or leave "
            "variants out for the default"
        )
    return texts


def _is_pair(variant: object) -> bool:
    return isinstance(variant, tuple) and len(variant) == 2 and isinstance(variant[1], Mapping)


def _written(variant: Any) -> str:
    if isinstance(variant, str):
        return variant
    if _is_pair(variant):
        variant = Choice(variant[0], dict(variant[1]))
    if not isinstance(variant, Choice):
        raise ValueError(
            f"variants: {variant!r} must be text such as 'performer:num_features=64', a pair such "
            "as ('performer', {'num_features': 64}), or a Choice"
        )
    try:
        options = [f"{name}={json.dumps(value)}" for name, value in variant.options.items()]
    except TypeError:
        raise ValueError(
            f"variants: an option of {variant.label} cannot be written as text; give numbers, "
            "texts, truth values or lists of them"
        ) from None
    return ":".join([variant.name, *([",".join(options)] if options else [])])


def split_options(text: str) -> list[str]:
    """The parts of OPTION=VALUE,OPTION=VALUE, where a list may stand as [1, 2]."""
    return re.split(r",(?![^\[]*\])", text) if text else []


def read_value(text: str) -> Any:
    """A YAML scalar, or a list of them. Raises ValueError on text that is none."""
    require(f"an option's value ({text})", ["jsonargparse", "yaml"])
    from jsonargparse import get_loader

    try:
        return get_loader("yaml")(text)
    except Exception as error:  # of yaml's many kinds
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the value {text!r} cannot be read ({reason}); quote it, or write a list as [1, 2]"
        ) from None


def check_variant(choice: Choice, text: str = "") -> None:
    """Build a known variant once.

    text: what the user wrote, for errors.
    Raises ValueError as `parse_variant` does.
    """
    types = {option.name: option.type for option in options_of(choice.name)}
    for option, value in choice.options.items():
        _check(choice.name, option, value, types)
    try:
        choice.build(HEADS, HEAD_DIM, max_length=LENGTH)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{text or choice.name}: {choice.name} cannot be built with these options "
            f"({str(error).splitlines()[0]})"
        ) from None


def _option(text: str, name: str, part: str) -> tuple[str, Any]:
    option, equals, value = part.partition("=")
    if not (option.strip() and equals):
        raise ValueError(
            f"{text}: {part!r} is not of the form option=value; write "
            f"{name}:option=value,option=value"
        )
    return option.strip(), read_value(value)


def _check(name: str, option: str, value: Any, types: dict[str, str]) -> None:
    allowed = [known for known in types if known not in ("heads", "head_dim")]
    if option in ("heads", "head_dim"):
        raise ValueError(
            f"{name}: {option} comes from the model that is compared on; leave it out (the options "
            f"are {', '.join(allowed)})"
        )
    if option not in types:
        raise ValueError(
            f"{name} has no option {option!r}{nearest(option, allowed)}; its options are "
            f"{', '.join(allowed)}"
        )
    kinds = [kind for part in re.split(r"\s*\|\s*", types[option]) for kind in KINDS.get(part, ())]
    fits = not kinds or (
        isinstance(value, tuple(kinds)) and (not isinstance(value, bool) or bool in kinds)
    )
    if not fits:
        raise ValueError(
            f"{name}: {option}={value!r} must be {types[option].replace(' | ', ' or ')}"
        )
