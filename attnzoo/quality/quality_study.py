"""What a study of a model's quality measures, read from YAML: texts, lengths, variants with a range
of their knob, and the search for mixes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from attnzoo.arguments import check_list, check_positive
from attnzoo.configuration import check_mapping, read_yaml
from attnzoo.quality.mixes import resolved
from attnzoo.registry import Choice, find, names

# Raises ValueError on a variant or options that cannot be built.
Check = Callable[[Choice], None]

EXAMPLE = "sliding_window: {window: [64, 256]}"


@dataclass(frozen=True)
class Layers:
    """One layer at a time.

    length: tokens of the reading.
    variants: what each layer is tried with, and the mixes are made of.
    """

    length: int
    variants: tuple[Choice, ...]


@dataclass(frozen=True)
class Mixes:
    """The search for mixes.

    tolerances: how far from exact a mix may be, as a share (0.01: the perplexity within 1%; an
    encoder: a mean cosine of 0.99 at least).
    evaluations: mixes measured for each tolerance.
    lengths: tokens, at which the mixes found are measured, on text that was not used to find them.
    """

    tolerances: tuple[float, ...]
    evaluations: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """What is measured.

    texts: names of texts, or files.
    lengths: tokens, at which every layer is swapped.
    sequences: read of each text (an encoder: passages of each).
    variants: what all layers are swapped to.
    layers, mixes: None leaves that part out; mixes need layers.
    """

    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    sequences: int
    variants: tuple[Choice, ...]
    layers: Layers | None = None
    mixes: Mixes | None = None


def read_study(path: Path, check: Check) -> Study:
    """Read and check a whole study.

    path: a YAML file.
    check: raises ValueError on a choice that cannot be built.
    Raises ValueError, one sentence that names the file, on an unknown key or a value that is not
    allowed.
    """
    what = f"study {path}"
    found = read_yaml(path, what)
    check_mapping(what, found, {*(field.name for field in fields(Study)), "zoo"})
    try:
        _need(found, "texts", "lengths", "sequences", "variants")
        lengths = _lengths("lengths", found["lengths"])
        layers = _layers(found["layers"], check) if "layers" in found else None
        if "mixes" in found and layers is None:
            raise ValueError("mixes are made of what layers tried; add layers, or remove mixes")
        return Study(
            texts=_texts(found["texts"]),
            lengths=lengths,
            sequences=check_positive("sequences", found["sequences"]),
            variants=(
                *_choices("variants", found["variants"], lengths[-1], check),
                *_rest(found, lengths[-1], check),
            ),
            layers=layers,
            mixes=_mixes(found["mixes"]) if "mixes" in found else None,
        )
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_choice(choice: Choice, length: int, check: Check) -> Choice:
    """The choice, when it can be built for inputs of `length` tokens. Raises ValueError."""
    find(choice.name)
    check(resolved(choice, length, seed=0))
    return choice


def _rest(found: dict[str, Any], length: int, check: Check) -> Iterator[Choice]:
    """The variants of the zoo that the study does not name, at their defaults, where it says `zoo:
    true`."""
    if not isinstance(found.get("zoo", False), bool):
        raise ValueError(
            f"zoo={found['zoo']!r} must be true or false: whether variants that are not named join "
            "at their default options"
        )
    if found.get("zoo"):
        yield from (
            check_choice(Choice(name), length, check)
            for name in names()
            if name not in found["variants"] and name != "standard"
        )


def _choices(what: str, found: Any, length: int, check: Check) -> tuple[Choice, ...]:
    """Every combination of the values given for a variant's options."""
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{what} must be a mapping from variants to their options, such as {{{EXAMPLE}}}"
        )
    choices: list[Choice] = []
    for name, options in found.items():
        find(str(name))
        if not isinstance(options, dict):
            raise ValueError(
                f"{what}: {name} must have a mapping of options, {{}} for its defaults, such as "
                f"{EXAMPLE}"
            )
        values = [
            [(option, value) for value in (given if isinstance(given, list) else [given])]
            for option, given in options.items()
        ]
        choices += [
            check_choice(Choice(name, dict(chosen)), length, check)
            for chosen in itertools.product(*values)
        ]
    if len({choice.label for choice in choices}) < len(choices):
        raise ValueError(f"{what} names the same options twice")
    return tuple(choices)


def _layers(found: Any, check: Check) -> Layers:
    check_mapping("layers", found, {"length", "variants"})
    _need(found, "length", "variants")
    length = check_positive("layers: length", found["length"])
    return Layers(length, _choices("layers: variants", found["variants"], length, check))


def _mixes(found: Any) -> Mixes:
    check_mapping("mixes", found, {field.name for field in fields(Mixes)})
    _need(found, "tolerances", "evaluations", "lengths")
    tolerances = found["tolerances"]
    if (
        not isinstance(tolerances, list)
        or not tolerances
        or not all(isinstance(share, int | float) and 0 <= share < 1 for share in tolerances)
    ):
        raise ValueError(
            f"mixes: tolerances={tolerances!r} must be shares from 0 to 1, such as [0.01, 0.05, "
            "0.1]"
        )
    return Mixes(
        tuple(sorted(tolerances)),
        check_positive("mixes: evaluations", found["evaluations"]),
        _lengths("mixes: lengths", found["lengths"]),
    )


def _lengths(what: str, found: Any) -> tuple[int, ...]:
    return tuple(sorted({check_positive(what, length) for length in check_list(what, found)}))


def _texts(found: Any) -> tuple[str, ...]:
    for name in check_list("texts", found):
        if not isinstance(name, str):
            raise ValueError(f"texts: {name!r} must be the name of a text, or a file")
    return tuple(dict.fromkeys(found))


def _need(found: dict[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given; see the shipped configs/quality")
