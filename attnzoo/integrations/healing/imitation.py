"""Imitating exact attention layer by layer: what the attention blocks of a model were given and
answered, and how far a swapped one is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.integrations.evaluating import uncompiled
from attnzoo.integrations.swapping import record_of, swapped_part


@dataclass(frozen=True)
class RecordedCall:
    """One run of a layer's attention block, its projections included: the arguments it was given
    and the (batch, length, width) it answered."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[RecordedCall]]:
    """Record the calls of every swapped layer's attention block, in the order in which they run,
    until the context ends.

    model: one that `attnzoo.swap` changed. For exact attention swap in "standard": the masks that
    its blocks are given are then those that any other attention of the zoo takes. A compiled model
    runs uncompiled inside.
    Raises ValueError when the model is not swapped or runs with a key-value cache, which a second
    call would fill again.
    """
    record, calls = record_of(model), []

    def keep(
        layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if any(kwargs.get(name) is not None for name in ("past_key_values", "cache")):
            raise ValueError(
                "past_key_values: a recorded model must run without a cache; call it with "
                "use_cache=False"
            )
        calls.append(RecordedCall(layer, args, dict(kwargs), _hidden(output).detach()))

    hooks = [
        module.register_forward_hook(partial(keep, layer), with_kwargs=True)
        for layer, module in record.modules.items()
    ]
    try:
        with uncompiled():
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def matching_loss(model: nn.Module, call: RecordedCall) -> Tensor:
    """How far the model's block is from a recorded answer when it is given what the recorded one
    was: |out - exact|² / |exact|², a scalar.

    0 is the same answer, 1 what answering zeros would get. Every slot counts, padded ones too. The
    gradient reaches this block alone.
    """
    exact = call.output.float()
    out = _hidden(record_of(model).modules[call.layer](*call.args, **call.kwargs)).float()
    return (out - exact).square().sum() / exact.square().sum()


def attention_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the swapped layers' attention blocks by name: projections, and what the
    attentions themselves learn.

    Names are those in the model that was swapped, whatever wraps it.

    Raises ValueError when the model is not swapped.
    """
    part, record = swapped_part(model)
    blocks = {
        id(parameter) for module in record.modules.values() for parameter in module.parameters()
    }
    return {
        name: parameter for name, parameter in part.named_parameters() if id(parameter) in blocks
    }


def projection_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `attention_parameters` that are the model's own, and so are not in the file that
    `attnzoo.save` writes."""
    learned = {
        id(parameter) for core in record_of(model).cores.values() for parameter in core.parameters()
    }
    return {
        name: parameter
        for name, parameter in attention_parameters(model).items()
        if id(parameter) not in learned
    }


def _hidden(output: Any) -> Tensor:
    """The hidden states of a block's answer, which may carry weights beside them."""
    return output if isinstance(output, torch.Tensor) else output[0]
