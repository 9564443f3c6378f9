"""What all commands share: how one is declared, a parser that raises sentences, configuration
files, dtypes and seeds, and consoles."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # pyright: ignore[reportPrivateImportUsage]
from rich.console import Console

from attnzoo.arguments import nearest
from attnzoo.configuration import check_mapping, read_yaml

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")
SEEDS = 2**32
PIPED_WIDTH = 120  # columns, when the output is no terminal and COLUMNS does not say


@dataclass(frozen=True)
class Command:
    """One command.

    add_arguments: declares them, and imports nothing heavy.
    run: does the work and returns the exit code.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


class Parser(ArgumentParser):
    """A parser whose complaints are ValueErrors of one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        raise ValueError(
            f"{_plain(message, options)}; see {self.prog.replace(' [options]', '')} --help"
        )


def _plain(message: str, options: list[str]) -> str:
    """jsonargparse's complaint in plain words, with the nearest of what is allowed."""
    message = " ".join(message.split())
    if match := re.fullmatch(r"unrecognized arguments: (\S+)(.*)", message):
        return f"unknown argument {match[1]!r}{nearest(match[1], options)}"
    if match := re.fullmatch(
        r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message
    ):
        allowed = re.findall(r"[\w-]+", match[3])
        return (
            f"{match[1]} {match[2]!r} is unknown{nearest(match[2], allowed)}; choose one of "
            f"{', '.join(allowed)}"
        )
    if match := re.fullmatch(r"the following arguments are required: (?:\w+\.)?(\w+)", message):
        return f"{match[1]} is missing"
    message = re.sub(r'Parser key "([^"]+)"(?: element \d+)?: ', r"\1: ", message)
    return re.sub(
        r"Expected an? <class '(\w+)'>\. Got value: (.*)",
        lambda m: f"{m[2]} is not a {_KINDS.get(m[1], m[1])}",
        message,
    )


_KINDS = {"int": "whole number", "float": "number", "str": "text", "bool": "truth value"}


class ConfigFile(ActionConfigFile):
    """--config FILE: checks the file first, so that a mistake in it is named with the file and the
    key."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        check_config(
            values,
            {
                action.dest: action
                for action in parser._actions
                if action.dest not in ("help", "config", "print_config")
            },
        )
        super().__call__(parser, cfg, values, option_string)


def check_config(path: str, known: dict[str, Any]) -> None:
    """Raise a ValueError, one sentence, when the file cannot be read, is no YAML mapping, has an
    unknown key or an empty one."""
    found = read_yaml(Path(path), f"--config {path}")
    check_mapping(f"--config {path}", found, known)
    for key, value in found.items():
        if known[key].nargs == "+" and (not isinstance(value, list) or not value):
            raise ValueError(
                f"--config {path}: {key} must be a list that is not empty, such as "
                f"[{value if value else '...'}]"
            )


def check_dtype(text: str) -> torch.dtype:
    """The dtype. Raises ValueError when it is none of `DTYPES`."""
    import torch

    if text not in DTYPES:
        raise ValueError(
            f"dtype={text!r} is unknown{nearest(text, DTYPES)}; use one of {', '.join(DTYPES)}"
        )
    return getattr(torch, text)


def check_seed(seed: int) -> None:
    """Raise ValueError on a seed that has more than 32 bits."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed={seed} is out of range; use 0 to {SEEDS - 1}")


def screen() -> Console:
    """Standard output: plain text without any ANSI code when it is not a terminal or NO_COLOR is
    set."""
    return _console(sys.stdout)


def messages() -> Console:
    """Standard error, for progress and remarks."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR"))
    width = PIPED_WIDTH if not stream.isatty() and not os.environ.get("COLUMNS") else None
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        width=width,
        highlight=False,
        soft_wrap=False,
        emoji=False,
        markup=False,
    )
