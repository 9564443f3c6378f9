"""What all commands share: how one is declared, a parser that raises sentences, configuration
files, variants among the arguments, and the console."""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import (  # pyright: ignore[reportPrivateImportUsage]
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
)
from rich.console import Console

from attnzoo.arguments import check_list, nearest
from attnzoo.configuration import check_mapping, read_yaml

if TYPE_CHECKING:
    from attnzoo.results.table import Table

CHOSEN = "variant"  # the name of the arguments without one
PIPED_WIDTH = 120  # columns, when the output is no terminal and COLUMNS does not say


@dataclass(frozen=True)
class Command:
    """One command.

    add_arguments: declares them, and imports nothing heavy.
    run: does the work and returns the exit code.
    is_quick: it answers at once, but for loading torch, and says nothing before.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    is_quick: bool = False


class HelpFormatter(DefaultHelpFormatter):
    """Says the default of an option once, and that there is none by saying nothing."""

    def _get_help_string(self, action: Action) -> str:
        said = action.help or ""
        if not action.option_strings or isinstance(action, ActionConfigFile):
            return said
        if action.required:
            return f"{said} (required)"
        has_default = not any(action.default is one for one in (None, False, SUPPRESS))
        return f"{said} (default: %(default)s)" if has_default and "default" not in said else said


class Parser(ArgumentParser):
    """A parser whose complaints are ValueErrors of one sentence."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        program = self.prog.replace(" [options]", "")
        if missing := re.fullmatch(r"the following arguments are required: (\w+)\..*", message):
            program = f"{program} {missing[1]}"
        raise ValueError(f"{_plain(message, options)}; see {program} --help")


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
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        missing = [name.rpartition(".")[2] for name in match[1].split(", ")]
        return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
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
                if action.dest not in ("help", "config", "print_config", CHOSEN)
            },
        )
        super().__call__(parser, cfg, values, option_string)


def check_config(path: str, known: dict[str, Any]) -> None:
    """Raise a ValueError, one sentence, when the file cannot be read, is no YAML mapping, has an
    unknown key or an empty one."""
    found = read_yaml(Path(path), f"--config {path}")
    check_mapping(f"--config {path}", found, known)
    for key, value in found.items():
        if known[key].nargs == "+":
            check_list(f"--config {path}: {key}", value)


def add_variants(parser: ArgumentParser, default: str) -> None:
    """The variants of a command: its first arguments, and --variants as in a YAML file.

    default: which they are when none is given.
    """
    parser.add_argument(
        CHOSEN,
        nargs="*",
        type=str,
        default=[],
        help="the variants, before the options, as --variants takes them",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"such as performer:num_features=64 (default: {default})",
    )


def variants_of(settings: Namespace) -> list[str] | None:
    """The variants of `add_variants`; None when none is given. Raises ValueError when they are
    given twice."""
    chosen, named = settings[CHOSEN], settings.variants
    if chosen and named:
        raise ValueError(
            f"variants are given twice, {' '.join(chosen)} and --variants {' '.join(named)}; give "
            "them once"
        )
    return chosen or named


def screen() -> Console:
    """Standard output: plain text without any ANSI code when it is not a terminal or NO_COLOR is
    set."""
    return _console(sys.stdout)


def print_tables(tables: Iterable[Table]) -> None:
    """Tables with their notes and what their columns mean."""
    from rich.text import Text

    from attnzoo.report.tables import rich_table

    for table in tables:
        screen().print(Text(table.title, style="bold"))
        screen().print(rich_table(table))
        for note in filter(None, (*table.notes, table.formula)):
            screen().print(Text(note, style="dim"))
        screen().print()


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
