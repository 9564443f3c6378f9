"""The tasks by name."""

from __future__ import annotations

from attnzoo.arguments import nearest
from attnzoo.tasks.copying import Copy
from attnzoo.tasks.induction import Induction
from attnzoo.tasks.listops import ListOps
from attnzoo.tasks.lookup import Lookup
from attnzoo.tasks.mqar import MQAR
from attnzoo.tasks.needle import Needle
from attnzoo.tasks.parity import Parity
from attnzoo.tasks.permutations import Permutations
from attnzoo.tasks.pixels import Pixels
from attnzoo.tasks.shakespeare import Shakespeare
from attnzoo.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        MQAR,
        Copy,
        Induction,
        Needle,
        Lookup,
        ListOps,
        Pixels,
        Shakespeare,
        Parity,
        Permutations,
    )
}


def find_task(name: str) -> type[Task]:
    """The task of this name. Raises ValueError, with the nearest name, when there is none."""
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}{nearest(name, TASKS)}; the tasks are {', '.join(TASKS)}"
        )
    return TASKS[name]
