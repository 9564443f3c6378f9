"""The zoo's list: `variants/` and the entry points of other packages are discovered, a
constructor's signature is its configuration."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

from attnzoo.arguments import nearest
from attnzoo.attention import Attention
from attnzoo.spec import Spec, ask

_registered: dict[str, type[Attention]] = {}
#: Where a package of its own names the modules whose import registers its variants.
GROUP = "attnzoo.variants"
#: What every variant takes first.
SIZES = ("heads", "head_dim")
AttentionClass = TypeVar("AttentionClass", bound=type[Attention])


@dataclass(frozen=True)
class Option:
    """One constructor argument of a variant. `default` is `inspect.Parameter.empty` when it must be
    given."""

    name: str
    type: str
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Description:
    """A variant in words: its spec, its options, and the docstring that explains it."""

    spec: Spec
    options: tuple[Option, ...]
    text: str

    def __str__(self) -> str:
        """Name, paper, docstring and options, to be read."""
        spec = self.spec
        options = ", ".join(
            one.name if one.required else f"{one.name}={one.default!r}" for one in self.options
        )
        head = f"{spec.name}: {spec.title}\n{spec.paper}"
        return f"{head}\n\n{self.text}\n\nattnzoo.build({spec.name!r}, {options})"


@dataclass(frozen=True)
class Choice:
    """A variant by name, with options for it.

    name: of a registered variant.
    options: arguments of its constructor, without heads and head_dim.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options in one line, such as "performer num_features=64"."""
        return " ".join(
            [self.name, *(f"{option}={value}" for option, value in self.options.items())]
        )

    def completed(self, **offered: Any) -> Choice:
        """The choice with those of the offered options that its variant takes and it lacks."""
        taken = {option.name for option in options_of(self.name)}
        supplied = {option: value for option, value in offered.items() if option in taken}
        return Choice(self.name, {**supplied, **self.options})

    def build(self, heads: int, head_dim: int, **offered: Any) -> Attention:
        """The variant itself.

        offered: options such as seed and max_length, see `completed`.
        Raises ValueError as `attnzoo.build` does.
        """
        return build(self.name, heads=heads, head_dim=head_dim, **self.completed(**offered).options)


#: Reads a choice from what a user wrote; the command line knows how.
ParseChoice = Callable[[str], Choice]


def register(cls: AttentionClass) -> AttentionClass:
    """Class decorator: put an `Attention` subclass into the zoo under `cls.spec.name`. Raises
    ValueError if the name is taken."""
    if not (
        inspect.isclass(cls)
        and issubclass(cls, Attention)
        and isinstance(getattr(cls, "spec", None), Spec)
    ):
        raise ValueError(f"register takes an Attention subclass with a `spec`; got {cls!r}")
    name = cls.spec.name
    taken = _registered.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(
            f"the name {name!r} is taken by {taken.__qualname__}; give the new variant another "
            "spec.name"
        )
    _registered[name] = cls
    return cls


def names() -> list[str]:
    """Names of all variants: standard, the baseline, first, then in alphabetical order."""
    _discover()
    return sorted(_registered, key=lambda name: (name != "standard", name))


def build(name: str, /, *sizes: int, **options: Any) -> Attention:
    """A variant, such as `attnzoo.build("performer", heads=8, head_dim=64, num_features=256)`.

    name: one of `attnzoo.names()`.
    sizes: heads and head_dim, where they are given without their names.
    options: the variant's own, by name, as `attnzoo.describe(name)` explains them.
    Raises ValueError on an unknown name (with the nearest one), an unknown option (with those that
    exist), a missing one, and one given twice.
    """
    cls = find(name)
    known = {option.name: option for option in options_of(name)}
    if len(sizes) > len(SIZES):
        raise ValueError(
            f"{name} takes heads and head_dim without their names and got {sizes!r}; name the "
            f"rest: {', '.join(list(known)[2:])}"
        )
    for size, value in zip(SIZES, sizes, strict=False):
        if size in options:
            raise ValueError(
                f"{size} is given twice, {value!r} and {options[size]!r}; give it once"
            )
        options[size] = value
    for option in options:
        if option not in known:
            raise ValueError(
                f"{name} has no option {option!r}{nearest(option, known)}; its options are "
                f"{', '.join(known)}"
            )
    missing = [
        option.name for option in known.values() if option.required and option.name not in options
    ]
    if missing:
        raise ValueError(
            f"{name} needs {' and '.join(missing)}: attnzoo.build({name!r}, "
            f"{', '.join(f'{m}=...' for m in missing)})"
        )
    return cls(**options)


def find(name: str) -> type[Attention]:
    """The class registered under `name`. Raises ValueError, with the nearest name, when there is
    none."""
    _discover()
    if not isinstance(name, str) or name not in _registered:
        raise ValueError(
            f"unknown attention {name!r}{nearest(name, _registered)}; the zoo has "
            f"{', '.join(names())}"
        )
    return _registered[name]


def spec_of(name: str) -> Spec:
    """The spec of a variant by name."""
    return find(name).spec


def options_of(name: str) -> tuple[Option, ...]:
    """The constructor arguments of a variant, in order, heads and head_dim included."""
    return _options_of(find(name))


@cache  # reading annotations takes longer than building most variants
def _options_of(cls: type[Attention]) -> tuple[Option, ...]:
    constructor = cls.__init__
    hints = get_type_hints(constructor)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return tuple(Option(p.name, _type_name(hints.get(p.name, Any)), p.default) for p in parameters)


def sized(name: str, length: int) -> dict[str, Any]:
    """The options without which a variant cannot be built for `length` tokens, beside heads and
    head_dim: max_length, or none."""
    return {"max_length": length} if spec_of(name).needs_max_length else {}


def describe(name: str) -> Description:
    """Everything the zoo knows of a variant without building it; print it to read it.

    name: one of `attnzoo.names()`.
    Raises ValueError on an unknown name, with the nearest one.
    """
    cls = find(name)
    return Description(cls.spec, options_of(name), inspect.getdoc(cls) or "")


def _type_name(hint: Any) -> str:
    return (
        hint.__name__
        if inspect.isclass(hint)
        else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )


def _specs() -> list[Spec]:
    return [spec_of(name) for name in names()]


ask(_specs)


@cache
def _discover() -> None:
    package = importlib.import_module("attnzoo.variants")
    for module in pkgutil.walk_packages(package.__path__, "attnzoo.variants."):
        importlib.import_module(module.name)
    for entry in entry_points(group=GROUP):
        try:
            entry.load()  # its `register` does the rest
        except Exception as error:
            warnings.warn(
                f"the variant {entry.name!r} ({entry.value}, an entry point of the group {GROUP}) "
                "cannot be loaded and is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
