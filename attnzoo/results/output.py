"""Where results go: a folder that is known to be writable before the work, and files that are whole
or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeVar

from attnzoo.results.progress import say
from attnzoo.results.result_file import ResultFile, ResultRow

Row = TypeVar("Row", bound=ResultRow)


def check_folder(path: str | Path, option: str = "--output") -> Path:
    """Make the folder if need be and try to write into it. Raises ValueError, one sentence, when
    that fails.

    option: of the command that gave it
    """
    folder, name = Path(path), option.removeprefix("--")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise ValueError(f"{name}={str(folder)!r} is a file; give a folder with {option}") from None
    except OSError as error:
        raise ValueError(
            f"{name}={str(folder)!r} cannot be written ({error.strerror}); give another folder "
            f"with {option}"
        ) from None
    return folder


def write_text(path: Path, text: str) -> Path:
    """Write the whole file or, when interrupted, none of it."""
    half = path.with_name(f".{path.name}.part")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
    return path


def open_results(path: Path, kind: type[Row]) -> ResultFile[Row]:
    """A result file to go on with, repaired if it was cut. Raises ValueError on a file of another
    kind, before it is touched."""
    results = ResultFile(path, kind)
    results.rows()
    said = results.repair()
    if said is not None:
        say(f"attnzoo: {said}")
    return results
