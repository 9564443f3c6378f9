"""Named sizes, such as models and GPUs: read from YAML, or written by the user as
`d=4096,heads=32`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from attnzoo.arguments import nearest
from attnzoo.configuration import read_yaml

Preset = TypeVar("Preset")


def read_presets(cls: type[Preset], path: Path) -> dict[str, Preset]:
    """All presets of a YAML file that maps a name to the fields of `cls`. Raises ValueError, in one
    sentence, on any defect of the file."""
    content = read_yaml(path, f"the preset file {path}")
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"the preset file {path} must map names to sizes, such as 'mine: {{{_example(cls)}}}'"
        )
    presets = {}
    for name, values in content.items():
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{name!r} in {path} must be a mapping of sizes, such as {{{_example(cls)}}}; got "
                f"{values!r}"
            )
        presets[str(name)] = make(cls, dict(values), f"{name!r} in {path}", default_name=str(name))
    return presets


def choose(cls: type[Preset], text: str, presets: Mapping[str, Preset], kind: str) -> Preset:
    """A preset by name, in any case, or one written out as `key=value,key=value`. Raises
    ValueError, with the nearest name, when it is neither."""
    text = text.strip()
    if "=" in text:
        return make(cls, dict(_pairs(text, kind, cls)), f"{kind} {text!r}", default_name=text)
    by_folded = {name.casefold(): preset for name, preset in presets.items()}
    if text.casefold() not in by_folded:
        known = ", ".join(presets)
        raise ValueError(
            f"unknown {kind} {text!r}{nearest(text.casefold(), presets)}; known are {known}, or "
            f"write one out: {_written(cls)}"
        )
    return by_folded[text.casefold()]


def make(cls: type[Preset], values: dict[str, Any], where: str, default_name: str) -> Preset:
    """Build `cls` from plain values, checking their names and types. Its own checks raise
    ValueError too; `where` is put before them."""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where} has an unknown size {key!r}{nearest(key, known)}; known are "
                f"{', '.join(known)}"
            )
    values = {"title": default_name, **values}
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}")
    hints = get_type_hints(cls)
    checked = {key: _number(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any, hint: Any, where: str) -> Any:
    """`value` if its type fits the field's annotation (a string holding such a number counts), else
    a ValueError."""
    if value is None or hint is str:
        return value if value is None else str(value)
    if hint is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{where}={value!r} must be true or false")
        return str(value).lower() == "true"
    convert, wanted = (float, "a number") if hint is float else (int, "a whole number")
    try:
        number = convert(str(value))
    except ValueError:
        raise ValueError(f"{where}={value!r} must be {wanted}") from None
    if isinstance(value, bool):
        raise ValueError(f"{where}={value!r} must be {wanted}")
    return number


def _pairs(text: str, kind: str, cls: type) -> list[tuple[str, str]]:
    pairs = []
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(
                f"{kind} {text!r}: {part!r} is not key=value; write for example {_written(cls)}"
            )
        if key.strip() in dict(pairs):
            raise ValueError(f"{kind} {text!r} gives {key.strip()} twice")
        pairs.append((key.strip(), value.strip()))
    return pairs


def _example(cls: type) -> str:
    return getattr(cls, "EXAMPLE", "")


def _written(cls: type) -> str:
    """The example as a command line takes it."""
    return _example(cls).replace(": ", "=").replace(", ", ",")
