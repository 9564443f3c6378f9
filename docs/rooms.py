"""The rooms of the library and the arrows between them, as a picture made from the imports.

    python docs/rooms.py

writes the picture into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "attnzoo"
#: From the ground up: a room imports from those before it. A room is a folder or a file of
#: `attnzoo/`; "attnzoo" itself is its `__init__.py`.
ROOMS = (
    "version",
    "oracles",
    "eager",
    "arguments",
    "packages",
    "configuration",
    "results",
    "spec",
    "call",
    "call_checks",
    "spec_checks",
    "sequences",
    "autocast",
    "engines",
    "execution",
    "attention",
    "registry",
    "variants",
    "conventions",
    "layers",
    "integrations",
    "cost",
    "benchmarking",
    "texts",
    "fidelity",
    "quality",
    "tasks",
    "training",
    "conformance",
    "report",
    "public",
    "attnzoo",
    "commands",
    "__main__",
)
#: Files that the picture draws as one box, by its first word.
BOXES = {
    "arguments": ("arguments", "configuration", "packages", "results", "version"),
    "call": ("call", "call_checks", "spec_checks", "spec", "eager", "sequences", "autocast"),
    "attention": ("attention", "execution", "registry"),
}
#: What the picture leaves out: the public names and the entry point import most rooms.
NOT_DRAWN = ("attnzoo", "__main__")
START, END = "<!-- rooms: made by docs/rooms.py -->", "<!-- end of rooms -->"

Graph = dict[str, set[str]]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> Graph:
    """What each module imports of the package: at its top, inside functions, for type checkers."""
    known = modules()
    return {name: _imports_of(path, set(known)) - {name} for name, path in known.items()}


def _imports_of(path: Path, known: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update((inside & known) or {node.module})
    return found


def room_of(module: str) -> str:
    """The room that a module lives in."""
    return module.split(".")[1] if "." in module else module


def rooms_of(graph: Graph) -> Graph:
    """The arrows between rooms of a graph of modules."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        found[room_of(module)].update(map(room_of, others))
    return {room: others - {room} for room, others in found.items()}


def picture() -> str:
    """The rooms as a Mermaid graph: arrows that others imply are left out."""
    box = {room: first for first, rooms in BOXES.items() for room in rooms}
    below: defaultdict[str, set[str]] = defaultdict(set)
    for room, others in rooms_of(imports()).items():
        lower = {other for other in others if ROOMS.index(other) < ROOMS.index(room)}
        lower -= set(NOT_DRAWN)
        if room not in NOT_DRAWN:
            below[box.get(room, room)].update(box.get(other, other) for other in lower)
    for room, others in below.items():
        others.discard(room)
    lines = ["graph TD", *(f'{name}["{"<br>".join(rooms)}"]' for name, rooms in BOXES.items())]
    for room in (room for room in ROOMS if room in below):
        implied = set().union(*(_reached(below, other) for other in below[room]))
        targets = " & ".join(sorted(below[room] - implied))
        if targets or room not in BOXES:
            lines.append(f"{room} --> {targets}" if targets else room)
    return "\n".join(lines)


def _reached(below: Graph, room: str) -> set[str]:
    """The rooms below a room, itself left out."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        for other in below.get(waiting.pop(), set()) - found:
            found.add(other)
            waiting.append(other)
    return found


def with_picture(text: str) -> str:
    """A text with the picture between its two marks."""
    drawn = f"{START}\n```mermaid\n{picture()}\n```\n{END}"
    return re.sub(f"{START}.*{END}", lambda _: drawn, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(with_picture(page.read_text(encoding="utf-8")), encoding="utf-8")
