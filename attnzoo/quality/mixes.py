"""Which layer of a model gets which attention, in the forms that people read, that `swap` takes and
that files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attnzoo.fidelity.candidate import Candidate
from attnzoo.quality.quality_rows import EXACT
from attnzoo.registry import options_of

ALL_TOKENS = "inf"  # an option's value that stands for as many tokens as there are

Mix = Mapping[int, Candidate]  # layers that are not named keep the model's own attention


def swap_plan(mix: Mix, length: int, seed: int) -> dict[int, tuple[str, dict[str, Any]]]:
    """What `swap` takes, for inputs of `length` tokens: "inf" is that length, and so is a
    max_length that was not given."""
    return {
        layer: (candidate.name, resolved(candidate, length, seed))
        for layer, candidate in mix.items()
    }


def resolved(candidate: Candidate, length: int, seed: int) -> dict[str, Any]:
    """The options for inputs of `length` tokens."""
    known = {option.name: option for option in options_of(candidate.name)}
    offered = {
        "seed": seed,
        **(
            {"max_length": length} if "max_length" in known and known["max_length"].required else {}
        ),
    }
    given = {
        name: length if value == ALL_TOKENS else value for name, value in candidate.options.items()
    }
    return {**{name: value for name, value in offered.items() if name in known}, **given}


def grouped(mix: Mix) -> dict[str, Candidate]:
    """The mix by ranges of layers, such as "0-3,6"."""
    by_label: dict[str, list[int]] = {}
    for layer in sorted(mix):
        by_label.setdefault(mix[layer].label, []).append(layer)
    return {ranges(layers): mix[layers[0]] for layers in by_label.values()}


def label_of(mix: Mix) -> str:
    """The mix in words: "0-3,6: sliding_window window=64; 4: linear"."""
    return (
        "; ".join(f"{layers}: {candidate.label}" for layers, candidate in grouped(mix).items())
        or EXACT
    )


def as_json(mix: Mix) -> dict[str, list[Any]]:
    """The mix as a result file holds it."""
    return {
        layers: [candidate.name, dict(candidate.options)]
        for layers, candidate in grouped(mix).items()
    }


def ranges(layers: Iterable[int]) -> str:
    """Rising layers in the form that `swap` reads: 0, 1, 2, 3, 6 -> "0-3,6"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
