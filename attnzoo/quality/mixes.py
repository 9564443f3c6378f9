"""Which layer of a model gets which attention, in the forms that people read, that `swap` takes and
that files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attnzoo.quality.quality_rows import EXACT
from attnzoo.registry import Choice

ALL_TOKENS = "inf"  # an option's value that stands for as many tokens as there are

Mix = Mapping[int, Choice]  # layers that are not named keep the model's own attention


def swap_plan(mix: Mix, length: int, seed: int) -> dict[int, Choice]:
    """What `swap` takes, for inputs of `length` tokens."""
    return {layer: resolved(choice, length, seed) for layer, choice in mix.items()}


def resolved(choice: Choice, length: int, seed: int) -> Choice:
    """A choice for inputs of `length` tokens.

    "inf" among its options becomes that length, and so does a max_length that was not given.

    seed: of what it draws, unless it holds one.
    """
    options = {
        name: length if value == ALL_TOKENS else value for name, value in choice.options.items()
    }
    return Choice(choice.name, options).completed(max_length=length, seed=seed)


def grouped(mix: Mix) -> dict[str, Choice]:
    """The mix by ranges of layers, such as "0-3,6"."""
    by_label: dict[str, list[int]] = {}
    for layer in sorted(mix):
        by_label.setdefault(mix[layer].label, []).append(layer)
    return {ranges(layers): mix[layers[0]] for layers in by_label.values()}


def label_of(mix: Mix) -> str:
    """The mix in words: "0-3,6: sliding_window window=64; 4: linear"."""
    return (
        "; ".join(f"{layers}: {choice.label}" for layers, choice in grouped(mix).items()) or EXACT
    )


def as_json(mix: Mix) -> dict[str, list[Any]]:
    """The mix as a result file holds it."""
    return {layers: [choice.name, dict(choice.options)] for layers, choice in grouped(mix).items()}


def ranges(layers: Iterable[int]) -> str:
    """Rising layers in the form that `swap` reads: 0, 1, 2, 3, 6 -> "0-3,6"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
