"""The YAML files that users write and the ones that are shipped: where they are, and one sentence
for each that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnzoo.arguments import nearest


def configs_folder() -> Path:
    """The folder of shipped YAML files: beside the package in a checkout, inside it when
    installed."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds.

    what: the file in words, for errors.
    Raises ValueError, one sentence, when it cannot be read or parsed.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError(
            f"reading {what} needs PyYAML; install it with: pip install 'attnzoo[cli]'"
        ) from None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not a text file; give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(
            f"{what} is not valid YAML{where} ({getattr(error, 'problem', None) or error}); is it "
            "half-written?"
        ) from None


def check_mapping(
    what: str, found: Any, known: Iterable[str], *, may_be_empty: bool = False
) -> None:
    """Raise a ValueError, one sentence, when what a file holds is no mapping, has an unknown key or
    one without a value."""
    known = sorted(known)
    keys = ", ".join(known)
    if not isinstance(found, dict) or not (found or may_be_empty):
        said = "empty" if not found else f"a {type(found).__name__}"
        raise ValueError(f"{what} is {said}; it must hold `key: value` with the keys {keys}")
    for key, value in found.items():
        if key not in known:
            raise ValueError(
                f"{what} has the unknown key {key!r}{nearest(str(key), known)}; the keys are {keys}"
            )
        if value is None:
            raise ValueError(f"{what}: {key} has no value; give one or remove the line")
