"""The command line's own help as one page, made when the site is built beside the API reference."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from unittest import mock

from attnzoo.commands.command import Command
from attnzoo.commands.program import commands, main

COLUMNS = "84"  # of the help's lines: what a page is wide
EXIT_CODES = (
    "Every command ends with 0, with 1 after a fault of attnzoo's own, with 2 where a request "
    "cannot be met, and with 130 after Ctrl-C; `attnzoo check` ends with 4 where a rule fails."
)


def page() -> str:
    """Every command under its name, as `attnzoo COMMAND --help` prints it."""
    parts = [
        "# The command line",
        "`attnzoo COMMAND --help` prints these lines. " + EXIT_CODES,
        *(f"## attnzoo {one.name}\n\n```text\n{_help(one)}\n```" for one in commands()),
    ]
    return "\n\n".join(parts) + "\n"


def _help(command: Command) -> str:
    told = io.StringIO()
    narrow = mock.patch.dict(os.environ, COLUMNS=COLUMNS, NO_COLOR="1")
    with narrow, redirect_stdout(told), suppress(SystemExit):
        main([command.name, "--help"])
    # Some marks of jsonargparse's are seen by terminals alone.
    return "".join(sign for sign in told.getvalue() if sign.isprintable() or sign == "\n").rstrip()
