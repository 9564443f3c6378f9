"""What a benchmark is asked to measure: sweeps over settings, read from YAML, each setting with all
its contenders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from attnzoo.arguments import check_list, check_positive, check_seed, nearest
from attnzoo.benchmarking.timing import TOLERANCE
from attnzoo.configuration import check_mapping, read_yaml
from attnzoo.registry import Choice, ParseChoice, names

LEVELS = ("core", "multihead", "layer")
PHASES = ("forward", "forward+backward", "decode")
DECODE_ROOM = 4096  # tokens that a decoding state has room for beyond the length
MOST_TOKENS = 8  # decoded in a turn: the state grows by them
MOST_DECODE_ROUNDS = DECODE_ROOM // MOST_TOKENS - 1  # beside what is decoded before the first round
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in TOLERANCE)


@dataclass(frozen=True)
class Shape:
    """The sizes beside the length."""

    batch_size: int = 1
    heads: int = 8
    head_dim: int = 64

    def __post_init__(self) -> None:
        for name in ("batch_size", "heads", "head_dim"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class Cell:
    """One setting, in which all contenders run in turns. `attnzoo.benchmarking.bench_rows.Row` has
    the words."""

    level: str
    phase: str
    is_causal: bool
    length: int
    dtype: str
    shape: Shape
    segments: int = 1

    @property
    def piece_length(self) -> int:
        """Tokens of each piece of a row."""
        return self.length // self.segments

    def title(self) -> str:
        """Such as "core forward, causal, n = 4,096, float32, 1×8×64"."""
        shape = f"{self.shape.batch_size}×{self.shape.heads}×{self.shape.head_dim}"
        return (
            f"{self.level} {self.phase}, {'causal' if self.is_causal else 'not causal'}, n = "
            f"{self.length:,}, {self.dtype}, {shape}" + in_pieces(self.segments)
        )


def in_pieces(segments: int) -> str:
    """What a setting says of packed rows: such as ", 16 pieces a row"; nothing of one piece."""
    return f", {segments} pieces a row" if segments > 1 else ""


@dataclass(frozen=True)
class Contender:
    """An attention with its options and the backend asked for."""

    choice: Choice
    backend: str


@dataclass(frozen=True)
class Sweep:
    """Every combination of these.

    variants: as on the command line, NAME[:OPTION=VALUE,...]; empty means the whole zoo.
    segments: equal pieces that every row of a length is packed of; 1 is one sequence.
    budget: seconds a setting after which no new round is begun; a contender that three rounds have
    no room for gets no time.
    """

    levels: tuple[str, ...] = ("core",)
    phases: tuple[str, ...] = ("forward",)
    causal: tuple[bool, ...] = (False,)
    variants: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("auto",)
    lengths: tuple[int, ...] = (1024,)
    dtypes: tuple[str, ...] = ("float32",)
    shapes: tuple[Shape, ...] = (Shape(),)
    segments: tuple[int, ...] = (1,)
    rounds: int = 7
    budget: float = 10.0

    def __post_init__(self) -> None:
        for name, allowed in (("levels", LEVELS), ("phases", PHASES), ("dtypes", DTYPES)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(
                        f"{name}: {value!r} is unknown{nearest(value, allowed)}; choose one of "
                        f"{', '.join(allowed)}"
                    )
        for value in self.causal:
            if not isinstance(value, bool):
                raise ValueError(f"causal: {value!r} must be true or false")
        for length in self.lengths:
            check_positive("lengths", length)
            for pieces in self.segments:
                if length % check_positive("segments", pieces):
                    raise ValueError(
                        f"segments={pieces} does not divide lengths={length} into equal pieces; "
                        "give lengths that are multiples of it"
                    )
        if set(self.segments) != {1} and (self.levels != ("core",) or "decode" in self.phases):
            raise ValueError(
                f"segments={max(self.segments)} is for the core's forward passes; give packed rows "
                "a sweep of their own with levels: [core] and without phases: [decode]"
            )
        check_positive("rounds", self.rounds)
        if (
            not isinstance(self.budget, int | float)
            or isinstance(self.budget, bool)
            or not 0 < self.budget < float("inf")
        ):
            raise ValueError(f"budget={self.budget!r} must be a number of seconds above 0")
        if "decode" in self.phases and self.rounds > MOST_DECODE_ROUNDS:
            raise ValueError(
                f"rounds={self.rounds} is more than the {MOST_DECODE_ROUNDS} that a decoding state "
                "has room for; give fewer"
            )
        if "decode" in self.phases and self.levels != ("core",):
            raise ValueError(
                "phases: decode is a matter of the core; give it a sweep of its own with levels: "
                "[core]"
            )

    def cells(self) -> Iterator[Cell]:
        """All settings, short lengths first. Decoding is causal whatever `causal` says."""
        for length, segments, shape, dtype, level, phase in product(
            sorted(self.lengths), self.segments, self.shapes, self.dtypes, self.levels, self.phases
        ):
            for is_causal in (True,) if phase == "decode" else self.causal:
                yield Cell(level, phase, is_causal, length, dtype, shape, segments)

    def contenders(self, parse: ParseChoice) -> list[Contender]:
        """Every variant with every backend that it has. Raises ValueError on a wrong variant, and
        on a backend that none of them has."""
        choices = [parse(text) for text in self.variants or names()]
        known = [
            "auto",
            *dict.fromkeys(backend for choice in choices for backend in _backends(choice)),
        ]
        for backend in self.backends:
            if backend not in known:
                raise ValueError(
                    f"backends: none of the variants has {backend!r}{nearest(backend, known)}; "
                    f"choose one of {', '.join(known)}"
                )
        return [
            Contender(choice, backend)
            for choice in choices
            for backend in self.backends
            if backend in ("auto", *_backends(choice))
        ]


#: What a file, a command line and a call of `attnzoo.bench` may set: the sizes of a shape also
#: one by one, each with one value or a list, and dtypes also as `dtype`.
SIZES = tuple(size.name for size in fields(Shape))
OF_ALL = ("device", "seed")
SETTINGS = (*(setting.name for setting in fields(Sweep)), *SIZES, "dtype")


@dataclass(frozen=True)
class Plan:
    """A whole benchmark.

    device: cpu, cuda or cuda:INDEX.
    seed: of inputs and of every random choice.
    """

    device: str = "cpu"
    seed: int = 0
    sweeps: tuple[Sweep, ...] = field(default_factory=lambda: (Sweep(),))

    def __post_init__(self) -> None:
        check_seed(self.seed)


def read_plan(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Read a YAML file: device, seed, the settings of a sweep (`SETTINGS`), and optionally
    `sweeps`, a list of mappings that each override them.

    path: None for a plan of one sweep, of `overrides` and what `Sweep` says of itself.
    overrides: settings that stand in the place of the file's, in every sweep.
    Raises ValueError, one sentence that names the file, on an unknown key or a value that is not
    allowed.
    """
    changes = dict(overrides or {})
    if path is None:
        return _plan({}, [{}], changes)
    what = f"config {path}"
    found = read_yaml(path, what)
    check_mapping(what, found, {*SETTINGS, *OF_ALL, "sweeps"})
    sweeps = found.pop("sweeps", None)
    if sweeps is not None and (not isinstance(sweeps, list) or not sweeps):
        raise ValueError(f"{what}: sweeps must be a list of at least one mapping")
    for sweep in sweeps or ():
        check_mapping(f"{what}, a sweep", sweep, SETTINGS)
    try:
        plan = _plan(found, sweeps or [{}], {})
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return _plan(found, sweeps or [{}], changes) if changes else plan


def _plan(shared: dict[str, Any], sweeps: list[dict[str, Any]], changes: dict[str, Any]) -> Plan:
    """The plan of settings that every sweep shares, of each sweep's own, and of changes to all."""
    whole = {**shared, **changes}
    return Plan(
        sweeps=tuple(_sweep(_layered(shared, sweep, changes)) for sweep in sweeps),
        **{key: whole[key] for key in OF_ALL if key in whole},
    )


def _layered(*layers: dict[str, Any]) -> dict[str, Any]:
    """The settings of a sweep, a later layer in the place of an earlier one's."""
    found: dict[str, Any] = {}
    for layer in layers:
        if {"dtype", "dtypes"} <= layer.keys():
            raise ValueError("dtype and dtypes are two names of one setting; give one of them")
        if "shapes" in layer:  # whole shapes, beside which an earlier size says nothing
            found = {key: value for key, value in found.items() if key not in SIZES}
        for key, value in layer.items():
            if key == "dtype":
                found["dtypes"] = _listed(value)
            elif key not in OF_ALL:
                found[key] = value
    return found


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _backends(choice: Choice) -> list[str]:
    return choice.build(1, 8, max_length=8).engine.backend_names()


def _sweep(found: dict[str, Any]) -> Sweep:
    read: dict[str, Any] = {}
    found = dict(found)
    sizes = {name: _listed(found.pop(name)) for name in SIZES if name in found}
    for key, value in found.items():
        if key in ("rounds", "budget"):
            read[key] = value
            continue
        listed = check_list(key, value)
        read[key] = tuple(_shape(item) if key == "shapes" else item for item in listed)
    for key in ("variants", "backends", "levels", "phases", "dtypes"):
        for item in read.get(key, ()):
            if not isinstance(item, str):
                raise ValueError(f"{key}: {item!r} must be text")
    shapes = [
        replace(shape, **dict(zip(sizes, chosen, strict=True)))
        for shape in read.pop("shapes", (Shape(),))
        for chosen in product(*sizes.values())
    ]
    return Sweep(shapes=tuple(dict.fromkeys(shapes)), **read)


def _shape(found: Any) -> Shape:
    check_mapping("shapes", found, SIZES)
    return Shape(**found)
