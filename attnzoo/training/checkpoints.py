"""The checkpoint of a run: one file, read as data only, that belongs to one configuration."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def read(path: Path, configuration: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` was given, or None where there is no file. Raises ValueError when it is damaged
    or of another configuration; it stays."""
    if not path.exists():
        return None
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
        held = found["configuration"]
        other = sorted(
            name
            for name in configuration.keys() | held.keys()
            if configuration.get(name) != held.get(name)
        )
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ):
        raise ValueError(
            f"{path} is no checkpoint of `attnzoo train`, or a damaged one; remove it to start "
            "that run anew"
        ) from None
    if other:
        raise ValueError(
            f"{path} is the checkpoint of another configuration ({', '.join(other)} differ); give "
            "another --output, or remove it to start anew"
        )
    return found


def write(path: Path, state: dict[str, Any]) -> None:
    """Write the whole file or, when interrupted, leave the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.part")
    torch.save(state, half)
    os.replace(half, path)
