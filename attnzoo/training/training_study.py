"""What is trained on a task, read from YAML: problems, model, budget, rates, seeds and contenders,
with small overrides for each size."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from attnzoo.arguments import check_count, check_list, check_positive, nearest
from attnzoo.configuration import check_mapping, read_yaml
from attnzoo.registry import ParseChoice
from attnzoo.tasks.task import SEED_LIMIT, Task
from attnzoo.training.contenders import Contender, parse_contender
from attnzoo.training.loop import Budget
from attnzoo.training.model import Sizes

KEYS = ("problem", "model", "budget", "held_out", "learning_rates", "seeds", "variants")
MAPPINGS = ("problem", "model", "budget")  # overridden key by key, the others whole
T = TypeVar("T", Sizes, Budget)


@dataclass(frozen=True)
class Study:
    """What is trained.

    problems: the task with each combination of its knobs.
    models: each combination of the sizes.
    held_out: sequences of validation, and of test.
    """

    problems: tuple[Task, ...]
    models: tuple[Sizes, ...]
    budget: Budget
    held_out: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    contenders: tuple[Contender, ...]


def read_study(
    path: Path, size: str, task: type[Task], overrides: dict[str, Any], parse_variant: ParseChoice
) -> Study:
    """A size of a file, with overrides by key as the file has them.

    Raises ValueError, one sentence that names the file, on an unknown key or a value that is not
    allowed.
    """
    what = f"--config {path}"
    found = read_yaml(path, what)
    check_mapping(what, found, (*KEYS, "sizes"))
    sizes = found.pop("sizes", None)
    if not isinstance(sizes, dict) or size not in sizes:
        known = [] if not isinstance(sizes, dict) else list(sizes)
        raise ValueError(
            f"{what} has no size {size!r}{nearest(size, known)}; its sizes are "
            f"{', '.join(map(str, known)) or 'missing'}"
        )
    check_mapping(f"{what}: size {size}", sizes[size], KEYS, may_be_empty=True)
    settings = _changed(found, sizes[size], what)
    try:
        return make_study(_changed(settings, overrides, what), task, parse_variant)
    except ValueError as error:
        if overrides and _stands(settings, task, parse_variant):
            raise  # the file is right: what is wrong was said in its place
        raise ValueError(f"{what}, size {size}: {error}") from None


def _changed(settings: dict[str, Any], changes: dict[str, Any], what: str) -> dict[str, Any]:
    """The settings with changes, which go into mappings key by key."""
    settings = dict(settings)
    for key, value in changes.items():
        if key in MAPPINGS and not (
            isinstance(value, dict) and isinstance(settings.get(key, {}), dict)
        ):
            raise ValueError(
                f"{what}: {key}={value!r} must be a mapping, such as {key}: {{name: value}}"
            )
        settings[key] = {**settings.get(key, {}), **value} if key in MAPPINGS else value
    return settings


def _stands(settings: dict[str, Any], task: type[Task], parse_variant: ParseChoice) -> bool:
    """Whether the settings are a study."""
    try:
        make_study(settings, task, parse_variant)
    except ValueError:
        return False
    return True


def make_study(found: dict[str, Any], task: type[Task], parse_variant: ParseChoice) -> Study:
    """The study of a mapping with the keys KEYS.

    Raises ValueError on an unknown key or a value that is not allowed.
    """
    missing = [key for key in KEYS if key not in found and key not in ("problem", "model")]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given; see the shipped configs/tasks")
    models = tuple(
        _section("model", Sizes, sizes) for sizes in _combinations(found.get("model") or {})
    )
    contenders = tuple(
        parse_contender(_text(text), parse_variant)
        for text in check_list("variants", found["variants"])
    )
    for sizes, contender in itertools.product(models, contenders):
        contender.layers(sizes.layers)
    if len({contender.label for contender in contenders}) < len(contenders):
        raise ValueError("variants names the same one twice")
    return Study(
        problems=_problems(task, found.get("problem", {})),
        models=models,
        budget=_section("budget", Budget, found["budget"]),
        held_out=check_positive("held_out", found["held_out"]),
        learning_rates=tuple(
            sorted({_rate(rate) for rate in check_list("learning_rates", found["learning_rates"])})
        ),
        seeds=tuple(dict.fromkeys(_seed(seed) for seed in check_list("seeds", found["seeds"]))),
        contenders=contenders,
    )


def _problems(task: type[Task], knobs: Any) -> tuple[Task, ...]:
    """The task with every combination of the values given for its knobs."""
    check_mapping(f"the problem of {task.name}", knobs, task.knobs(), may_be_empty=True)
    return tuple(map(task.from_knobs, _combinations(knobs or {})))


def _combinations(settings: Any) -> list[Any]:
    """The mapping with every combination of the values of its lists; anything else unchanged, for
    its reader to refuse."""
    if not isinstance(settings, dict):
        return [settings]
    values = [
        [(name, value) for value in (given if isinstance(given, list) else [given])]
        for name, given in settings.items()
    ]
    return [dict(chosen) for chosen in itertools.product(*values)]


def _section(name: str, kind: type[T], found: Any) -> T:
    check_mapping(name, found, [field.name for field in fields(kind)], may_be_empty=True)
    return kind(**(found or {}))


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"variants: {text!r} must be text, such as sliding_window:window=16")
    return text


def _rate(rate: Any) -> float:
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < 1:
        raise ValueError(
            f"learning_rates: {rate!r} must be a number between 0 and 1, such as 0.001 (YAML reads "
            "1e-3 as text)"
        )
    return float(rate)


def _seed(seed: Any) -> int:
    if check_count("seed", seed) >= SEED_LIMIT:
        raise ValueError(
            f"seed={seed} is out of range; use 0 to {SEED_LIMIT - 1}, so that no two runs see the "
            "same examples"
        )
    return seed
