"""Checkpoints of a model being healed: its swap and projections, the optimizer, and what the run
has found so far."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.integrations.healing.trained_model import save_healed

NAMES = "step-" + "[0-9]" * 6


def read_state(folder: Path, recipe: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The state of the last checkpoint in the folder and where it is, or a first state and None.

    Raises ValueError when that checkpoint is damaged or of another recipe.
    """
    found = sorted(folder.glob(NAMES))
    if not found:
        return {"recipe": recipe, "step": 0, "seconds": 0.0, "curve": [], "evaluations": []}, None
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text())
        other = sorted(
            key
            for key in recipe.keys() | state["recipe"].keys()
            if recipe.get(key) != state["recipe"].get(key)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}/state.json is missing or damaged; remove {path} to start anew"
        ) from None
    if other:
        raise ValueError(
            f"{folder} holds checkpoints of another recipe ({', '.join(other)} differ); give "
            "another --output, or remove them"
        )
    return state, path


def write(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write a checkpoint and remove the one before it. It gets its name only when it is whole, so
    an interrupt leaves one of the two."""
    before, partial, path = (
        list(folder.glob(NAMES)),
        folder / "partial",
        folder / f"step-{state['step']:06d}",
    )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_healed(model, partial)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(state))
    partial.rename(path)
    for old in before:
        shutil.rmtree(old)
    return path


def read_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Give the optimizer its state in a checkpoint, read as data only. Raises ValueError when it is
    not one."""
    path = checkpoint / "optimizer.pt"
    try:
        optimizer.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not an optimizer's state of this recipe ({reason}); remove {checkpoint} to "
            "start anew"
        ) from None
