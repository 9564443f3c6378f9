"""The command line. A command is one entry of `commands`; whatever goes wrong reaches the user as
one sentence."""

from __future__ import annotations

import gc
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attnzoo
from attnzoo.commands import FAILED, INTERRUPTED, REFUSED
from attnzoo.packages import EXTRAS

if TYPE_CHECKING:
    from attnzoo.commands.command import Command, Parser

#: The one option with an underscore, which jsonargparse adds beside --config.
PRINT_CONFIG = "--print_config"


def commands() -> tuple[Command, ...]:
    """All commands, in the order of the help."""
    from attnzoo.commands import (
        bench,
        check,
        compare,
        completion,
        doctor,
        flops,
        maps,
        report,
        scaling,
        train,
        zoo,
    )

    measured = (
        zoo.LIST,
        zoo.SHOW,
        compare.COMPARE,
        flops.FLOPS,
        scaling.SCALING,
        bench.BENCH,
        train.TRAIN,
        check.CHECK,
        maps.MAPS,
        report.REPORT,
        doctor.DOCTOR,
    )
    return (*measured, completion.completion(measured))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (a fault of ours), 2 (a request that cannot be
    met), 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An ASCII terminal gets ? for a Greek letter, not a crash.
            stream.reconfigure(errors="replace")
    try:
        code = run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        return _say_missing(error)
    except (ValueError, OSError, ImportError) as error:
        return _say(_sentence(error), REFUSED)
    except Exception as error:
        from attnzoo.benchmarking.heap import out_of_memory

        return _say_too_large(error) if out_of_memory(error) else _say_unexpected(error)


def run(arguments: list[str]) -> int:
    """Parse the arguments and run the command they name. Raises what the command raises."""
    parser = make_parser()
    settings = parser.parse_args([_dashed(argument) for argument in arguments])
    if settings.command is None:
        parser.print_help()
        return REFUSED
    command = next(command for command in commands() if command.name == settings.command)
    if command.is_quick:
        with _uncollected():
            return command.run(settings[command.name])
    if "torch" not in sys.modules:  # which takes longer than anyone waits without a word
        print(f"attnzoo {settings.command}: loading torch", file=sys.stderr, flush=True)
    return command.run(settings[command.name])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage, of which importing torch makes none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _dashed(argument: str) -> str:
    """An option as the parser spells it: --head_dim, as in Python and YAML, is --head-dim."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    name = name.replace("_", "-")
    return (PRINT_CONFIG if name == "--print-config" else name) + equals + value


def make_parser() -> Parser:
    """The parser of the whole command line, a subparser per command."""
    from attnzoo.commands.command import Parser

    parser = Parser(prog="attnzoo", description=attnzoo.__doc__, version=attnzoo.__version__)
    subcommands = parser.add_subcommands(dest="command", required=False)
    for command in commands():
        subparser = Parser(description=command.help)
        command.add_arguments(subparser)
        subcommands.add_subcommand(command.name, subparser, help=command.help)
    return parser


def _sentence(error: Exception) -> str:
    """An exception's message on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _say(sentence: str, code: int) -> int:
    print(f"attnzoo: {sentence}", file=sys.stderr)
    return code


def _say_missing(error: ModuleNotFoundError) -> int:
    module = (error.name or "").split(".")[0]
    if module not in EXTRAS:
        return _say_unexpected(error)
    return _say(
        f"{module} is not installed and this command needs it: pip install "
        f"'attnzoo[{EXTRAS[module]}]'",
        REFUSED,
    )


def _say_too_large(error: Exception) -> int:
    tried = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", str(error))
    size = "" if tried is None else f": {tried[2] or f'{int(tried[1]) / 2**30:,.1f} GiB'} at once"
    return _say(
        f"there is not enough memory for this{size}; give shorter --lengths, fewer --heads or "
        "--variants, or a machine with more",
        REFUSED,
    )


def _say_unexpected(error: Exception) -> int:
    with tempfile.NamedTemporaryFile(
        "w", prefix="attnzoo-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return _say(
        f"unexpected {type(error).__name__}: {_sentence(error)[:300]}. Please report it with "
        f"{file.name}, which says where it happened",
        FAILED,
    )
