"""Docstrings of this library as Markdown: paragraphs, equations, and a list where they name
arguments, one a line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

#: What may lead a line beside the names of arguments.
LEADS = ("returns", "raises")
CODE = re.compile(r"(`[^`]*`)")


def markdown(docstring: str, names: Collection[str] = ()) -> str:
    """A docstring as Markdown.

    names: of the arguments or fields; a line that begins with one of them and a colon is an entry
        of a list
    """
    return "\n\n".join(_paragraph(part, names) for part in docstring.split("\n\n") if part.strip())


def escaped(text: str) -> str:
    """Text whose signs mean nothing to Markdown outside of `code`."""
    parts = CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<\[\]|\\])", r"\\\1", part) for part in parts
    )


def _paragraph(text: str, names: Collection[str]) -> str:
    if text.startswith("    "):
        lines = [line.removeprefix("    ") for line in text.splitlines()]
        return "\n".join(["```text", *lines, "```"])
    if text.startswith("- "):
        return escaped(text)
    return "\n".join(_entries(text.splitlines(), names))


def _entries(lines: list[str], names: Collection[str]) -> Iterator[str]:
    """Lines of a paragraph, those of an argument as an item of a list."""
    within = False
    for line in lines:
        lead, _, rest = line.partition(":")
        known = [name.strip() for name in lead.split(",")]
        if rest and all(name in names or name in LEADS for name in known):
            yield from () if within else ("",)
            within = True
            yield f"- **{lead}**: {escaped(rest.strip())}"
        elif within and line.startswith("Raises "):
            yield f"- **raises** {escaped(line.removeprefix('Raises '))}"
        else:
            yield f"{'  ' if within else ''}{escaped(line.strip())}"
