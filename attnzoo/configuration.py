"""The YAML files that users write and the ones that are shipped: where they are, and one sentence for each that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def configs_folder() -> Path:
    """The folder of shipped YAML files: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds. what: the file in words, for errors. Raises ValueError, one sentence, when it cannot be read or parsed."""
    try:
        import yaml
    except ImportError:
        raise ImportError(f"reading {what} needs PyYAML; install it with: pip install 'attnzoo[cli]'") from None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not a text file; give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{what} is not valid YAML{where} ({getattr(error, 'problem', None) or error}); is it half-written?") from None
