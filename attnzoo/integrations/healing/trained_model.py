"""A swapped model whose attention was trained: the swap in one file, the projections that moved in
another beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from attnzoo.integrations.healing.imitation import projection_parameters
from attnzoo.integrations.sidecar import load, read_tensors, save, write_tensors
from attnzoo.integrations.swapping import unswap

Model = TypeVar("Model", bound=nn.Module)
SWAP, PROJECTIONS = "swap.safetensors", "projections.safetensors"


def save_healed(model: nn.Module, folder: Path) -> None:
    """Write what a swap and training changed: swap.safetensors as of `attnzoo.save`, and the
    swapped blocks' own weights in projections.safetensors.

    Raises what `attnzoo.save` raises.
    """
    save(model, folder / SWAP)
    write_tensors(dict(projection_parameters(model)), folder / PROJECTIONS)


def load_healed(model: Model, folder: Path) -> Model:
    """Swap a model as a folder of `save_healed` says and give its attention blocks their trained
    weights. Returns the model.

    model: the one that was healed, as it was before. `unswap` takes the attentions out and leaves
    the trained projections, which suit them and not exact attention: load the model anew to have it
    back.
    Raises ValueError on files that cannot be read or do not fit the model, naming the place; the
    model is then as it was.
    """
    path = folder / PROJECTIONS
    _, tensors = read_tensors(path)
    load(model, folder / SWAP)
    parameters = projection_parameters(model)
    for name in sorted(parameters.keys() | tensors.keys()):
        wrong = None
        if name not in tensors or name not in parameters:
            reason = (
                "missing from the file"
                if name in parameters
                else "not a projection of a swapped layer"
            )
            wrong = f"{name!r} is {reason}"
        elif tensors[name].shape != parameters[name].shape:
            wrong = (
                f"{name!r} has shape {tuple(tensors[name].shape)}; it must be "
                f"{tuple(parameters[name].shape)}"
            )
        if wrong:
            unswap(model)
            raise ValueError(f"{path}: {wrong}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model
