"""Running a model from a later layer on: the layers before it return what they gave in a recorded
exact run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def blocks_of(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The blocks that hold the attentions at `paths`: one a layer, in the order in which they run.
    [] when the model is not such a stack."""
    found: list[tuple[str, int]] = []
    for path in paths:
        steps = path.split(".")
        lists = [
            n
            for n in range(1, len(steps))
            if isinstance(model.get_submodule(".".join(steps[:n])), nn.ModuleList)
        ]
        if not lists:
            return []
        found.append((".".join(steps[: lists[0]]), int(steps[lists[0]])))
    stacks = {stack for stack, _ in found}
    if len(stacks) != 1:
        return []
    blocks = list(model.get_submodule(stacks.pop()).children())
    return blocks if [number for _, number in found] == list(range(len(blocks))) else []


@contextmanager
def recording(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Append what every block returns to `outputs`."""
    handles = [
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(blocks: Sequence[nn.Module], outputs: Sequence[Any], first: int) -> Iterator[None]:
    """Let blocks before `first` compute nothing: the last of them returns its recorded output.
    No-op where that cannot be."""
    if (
        first == 0
        or len(outputs) != len(blocks)
        or not all(isinstance(output, Tensor) for output in outputs)
    ):
        yield
        return
    skipped = blocks[:first]
    for number, block in enumerate(skipped):
        block.forward = _answer(outputs[number])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in skipped:
            del block.forward


def _answer(output: Tensor) -> Any:
    return lambda *inputs, **keywords: output
