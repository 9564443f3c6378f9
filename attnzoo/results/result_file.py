"""Result files: one JSON row a line, appended as they finish, read back, repaired when one was
cut."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Generic,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)


class ResultRow(Protocol):
    """A row of a result file.

    FORMAT: what the "format" of its line says.
    COMMAND: the command that writes it, for errors.
    """

    FORMAT: ClassVar[str]
    COMMAND: ClassVar[str]

    @property
    def key(self) -> Hashable:
        """What the row is about: of two rows with one key the later counts."""
        ...

    def to_json(self) -> str:
        """One line, which starts with the format."""
        ...

    @classmethod
    def from_fields(cls, found: dict[str, Any]) -> Self:
        """The row of a parsed line. Raises KeyError, TypeError or ValueError when it is another
        thing."""
        ...


R = TypeVar("R", bound=ResultRow)


class ResultFile(Generic[R]):
    """A JSONL file of rows of one kind."""

    def __init__(self, path: str | Path, kind: type[R]) -> None:
        self.path = Path(path)
        self.kind = kind

    def repair(self) -> str | None:
        """Drop a last line that an interrupted write has cut, and say so; None when there is
        none."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        whole, newline, rest = content.rpartition(b"\n")
        if not rest:
            return None
        if _parses(rest):  # the row is whole, only its newline is missing
            with self.path.open("ab") as file:
                file.write(b"\n")
            return None
        with self.path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
        kept = whole.count(b"\n") + bool(newline)
        return (
            f"{self.path} was cut in the middle of its last line: that half line is dropped, the "
            f"{kept} whole ones are kept"
        )

    def rows(self) -> list[R]:
        """All rows; of two with one key, the later. Raises ValueError, one sentence, on a file that
        is no result file."""
        found: dict[Hashable, R] = {}
        for row in read_rows(self.path, self.kind) if self.path.exists() else []:
            found[row.key] = row
        return list(found.values())

    def append(self, row: R) -> None:
        """Write one row so that it survives whatever happens next."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: str | Path, kind: type[R]) -> list[R]:
    """The rows of a result file in order; a last line that was cut is passed over.

    Raises ValueError, one sentence, on another file.
    """
    try:
        # A cut may lie inside a letter, so each line is decoded alone.
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read as results of `{kind.COMMAND}`: {error.strerror or error}"
        ) from None
    start = f'{{"format": "{kind.FORMAT}"'.encode()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), kind))
        except (json.JSONDecodeError, UnicodeDecodeError):
            if number == len(lines) and line.startswith(start[: len(line)]):
                continue
            raise ValueError(
                f"{path}, line {number} is no JSON; give a file that `{kind.COMMAND}` wrote, or "
                "remove that line"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number} is no row of this version of `{kind.COMMAND}` ({error})"
            ) from None
    return rows


def fields_of(kind: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in a parsed line. Raises KeyError on one that is not there,
    TypeError on one of another type than its own."""
    hints, known = get_type_hints(kind), {}
    for field in fields(kind):
        value, hint = found[field.name], hints[field.name]
        kinds = tuple(
            get_origin(one) or one
            for one in (get_args(hint) if isinstance(hint, UnionType) else (hint,))
        )
        kinds += (int,) * (float in kinds) + (list,) * (tuple in kinds)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{field.name} is {value!r}")
        known[field.name] = value
    return known


def _row(found: Any, kind: type[R]) -> R:
    if not isinstance(found, dict) or found.get("format") != kind.FORMAT:
        raise ValueError(
            "its format is "
            f"{found.get('format') if isinstance(found, dict) else type(found).__name__!r}, wanted "
            f"{kind.FORMAT!r}"
        )
    return kind.from_fields(found)


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
