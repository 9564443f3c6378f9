"""The rooms of the library: arrows point down, no circles, files that can be read in one go."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter

from rooms import PACKAGE, ROOMS, ROOT, imports, modules, room_of, with_picture

LONGEST, MOST_FILES = 320, 14
#: Names that several folders may use for the same thing.
COMMON = {"__init__.py", "reference.py", "cache.py"}
#: What is not yet as it should be. Entries may go; none may be added.
KNOWN_UPWARD: set[tuple[str, str]] = set()
KNOWN_CIRCLES: set[tuple[str, str]] = set()
KNOWN_NAMES = {"linear.py"}


def lines_of(name: str) -> int:
    return len(modules()[name].read_text(encoding="utf-8").splitlines())


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_arrows_point_down() -> None:
    upward = {
        (name, other)
        for name, others in imports().items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    }
    assert upward == KNOWN_UPWARD


def test_oracles_import_nothing_else_of_the_library() -> None:
    for name, others in imports().items():
        if room_of(name) == "oracles":
            assert {room_of(other) for other in others} <= {"oracles"}, name


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name: others - {other for first, other in KNOWN_CIRCLES | KNOWN_UPWARD if first == name}
        for name, others in imports().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
    for name, other in KNOWN_CIRCLES:
        assert other in imports()[name], f"{name} does not import {other} any more: take it out"


def test_files_are_short() -> None:
    long = {name for name in modules() if lines_of(name) > LONGEST}
    assert not long


def test_folders_are_short() -> None:
    files = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in files.items() if count > MOST_FILES}


def test_a_file_is_known_by_its_name() -> None:
    names = Counter(
        path.name
        for path in modules().values()
        if path.name not in COMMON and "oracles" not in path.parts
    )
    assert {name for name, count in names.items() if count > 1} == KNOWN_NAMES


def test_the_picture_is_current() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "```mermaid" in text
    assert with_picture(text) == text, f"run python docs/rooms.py: {PACKAGE} has other arrows now"
