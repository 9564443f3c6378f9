"""The API reference, made of the public names of `attnzoo` and their docstrings when the site is
built: docs/reference/, which git ignores."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import attnzoo
from attnzoo.report.result import Result  # what bench, compare, train and cost_table return
from docs.docstrings import markdown

FOLDER = Path(__file__).with_name("reference")
#: A page: its title, what it says of itself, and its names. What no page names stands on the last.
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "attention": (
        "An attention",
        "Building one, calling it, decoding with it, and what it says of itself.",
        (
            *("names", "build", "describe", "register", "Attention", "Spec", "Input", "Cost"),
            "UnsupportedError",
        ),
    ),
    "layers": (
        "Layers",
        "Modules that make queries, keys and values of hidden states around an attention.",
        ("MultiheadAttention", "LatentAttention", "latent_layer", "distance_biases"),
    ),
    "models": (
        "Models",
        "Another attention in a model that exists, and what such a model needs.",
        (
            *("swap", "unswap", "save", "load", "state_cache", "global_mask", "packed"),
            *("attention_maps", "replace_fallbacks", "restore_fallbacks"),
        ),
    ),
    "checking": (
        "Checks, oracles, conventions",
        "What judges an attention, and how other libraries spell one.",
        ("conformance", "oracles", "conventions"),
    ),
    "measuring": ("Counting and measuring", "What an attention or a model costs.", ()),
}
#: Methods that a user calls, which come before those that a subclass may override.
CALLED = ("forward", "weights", "init_state", "step", "cost")


def write() -> None:
    """Write all pages, and the one that lists them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")
    listed = "\n".join(PAGES)
    index = (
        "# API reference\n\nEvery public name of `attnzoo`, from its docstring. Shapes are in the "
        "order of the axes; a *source* link leads to the code.\n\n"
        f"```{{toctree}}\n:maxdepth: 2\n\n{listed}\n```\n"
    )
    (FOLDER / "index.md").write_text(index, encoding="utf-8")


def members(name: str) -> list[str]:
    """The public names on a page."""
    named = [one for _, _, names in PAGES.values() for one in names]
    rest = [one for one in attnzoo.__all__ if one not in named]
    return [*PAGES[name][2], *(rest if name == list(PAGES)[-1] else [])]


def page(name: str) -> str:
    """One page as Markdown."""
    title, said, _ = PAGES[name]
    parts = [f"# {title}", said]
    parts += [_described(one, getattr(attnzoo, one)) for one in members(name)]
    if name == list(PAGES)[-1]:
        parts += [_module_of(Result.__module__), _object(Result.__name__, Result)]
    return "\n\n".join(parts) + "\n"


def _described(name: str, thing: Any) -> str:
    if isinstance(thing, ModuleType):
        return _module(name, thing)
    return f"{_module_of('attnzoo')}\n\n{_object(name, thing)}"


def _module_of(name: str) -> str:
    """What the names below it belong to; links to their source follow from it."""
    return f"```{{py:currentmodule}} {name}\n```"


def _object(name: str, thing: Any) -> str:
    return _class(name, thing) if inspect.isclass(thing) else _function(name, thing)


def _module(name: str, module: ModuleType) -> str:
    parts = [f"## attnzoo.{name}", markdown(inspect.getdoc(module) or "")]
    parts.append(_module_of(f"attnzoo.{name}"))
    for one in _public(module):
        thing = getattr(module, one)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            parts.append(_object(one, thing))
    return "\n\n".join(parts)


def _public(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, thing in vars(module).items()
        if inspect.isfunction(thing)
        and thing.__module__ == module.__name__
        and not name.startswith("_")
    ]


def _class(name: str, cls: type) -> str:
    names = [one.name for one in fields(cls)] if is_dataclass(cls) else []
    names += [*_parameters(cls)]
    body = [markdown(_own_doc(cls), names)]
    methods = {one: method for one, method in vars(cls).items() if _is_shown(one, method)}
    for one in sorted(methods, key=lambda one: one not in CALLED):
        method = methods[one]
        if isinstance(method, property):
            body.append(_directive("py:property", one, markdown(inspect.getdoc(method) or "")))
        else:
            function = getattr(method, "__func__", method)
            text = markdown(inspect.getdoc(function) or "", _parameters(function))
            body.append(_directive("py:method", f"{one}{_signature(function)}", text))
    fences = "::::" if len(body) > 1 else ":::"
    text = "\n\n".join(part for part in body if part)
    return f"{fences}{{py:class}} {name}{_signature(cls)}\n{text}\n{fences}"


def _own_doc(cls: type) -> str:
    """Its docstring; none where dataclass has made one up."""
    text = inspect.getdoc(cls) or ""
    return "" if text.startswith(f"{cls.__name__}(") else text


def _is_shown(name: str, method: Any) -> bool:
    function = getattr(method, "__func__", method)
    able = inspect.isfunction(function) or isinstance(method, property)
    return able and bool(method.__doc__) and not name.startswith("_")


def _function(name: str, function: Any) -> str:
    text = markdown(inspect.getdoc(function) or "", _parameters(function))
    return _directive("py:function", f"{name}{_signature(function)}", text)


def _directive(kind: str, signature: str, text: str) -> str:
    return f":::{{{kind}}} {signature}\n{text}\n:::"


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _signature(function: Any) -> str:
    """The arguments with their defaults and types, without `self`."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "()"
    kept = [one for one in signature.parameters.values() if one.name != "self"]
    plain = signature.replace(parameters=kept)
    return str(plain).replace("'", "").replace("<class NoneType>", "None")
