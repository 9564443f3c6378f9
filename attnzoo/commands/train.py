"""attnzoo train: attentions trained on small tasks that tell them apart, run by run into a result
file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands import INTERRUPTED
from attnzoo.commands.command import Command, messages, screen
from attnzoo.commands.output import check_folder, open_results, progress_on, write_text
from attnzoo.commands.variants import parse_variant

if TYPE_CHECKING:
    from attnzoo.tasks.task import Task
    from attnzoo.training.training_rows import Row
    from attnzoo.training.training_study import Study


def add_arguments(parser: ArgumentParser) -> None:
    """The task, its study and what is changed in it."""
    parser.add_argument(
        "--task",
        type=str,
        required=True,
        help="mqar, copy, induction, needle, lookup, listops, pixels, shakespeare, parity or "
        "permutations",
    )
    parser.add_argument(
        "--size",
        type=str,
        default="quick",
        help="quick (under 5 minutes on 2 cores), cpu or gpu of the task's study; mqar has state "
        "too: what more state buys",
    )
    parser.add_argument(
        "--config",
        type=str,
        metavar="FILE",
        help="a YAML file in the place of the shipped configs/tasks/TASK.yaml",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help="such as sliding_window:window=16, gru, or linear+standard for layers that take turns "
        "(default: those of the study)",
    )
    parser.add_argument(
        "--problem",
        type=str,
        metavar="KNOB=VALUE,...",
        help="knobs of the task, such as pairs=16,length=128",
    )
    parser.add_argument("--steps", type=int, help="training steps of a run")
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="all tried with every seed; the one with the best mean on validation counts",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="of the start and of the order of the examples",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:INDEX")
    parser.add_argument(
        "--output",
        type=str,
        default="report",
        metavar="FOLDER",
        help="gets train-TASK.jsonl (each run as it ends), train-TASK.json and checkpoints",
    )


def run(settings: Namespace) -> int:
    """Check everything, train what the result file does not hold, print and write."""
    from attnzoo.bench.bench_rows import check_one_machine
    from attnzoo.bench.environment import environment
    from attnzoo.fidelity import check_device
    from attnzoo.tasks.task_names import find_task
    from attnzoo.training.devices import Devices
    from attnzoo.training.training_rows import Row
    from attnzoo.training.training_run import Run

    started, console = time.monotonic(), messages()
    task = find_task(settings.task)
    study = _study(settings, task)
    devices = Devices(check_device(settings.device), study.budget.precision)
    folder = check_folder(settings.output)
    results = open_results(folder / f"train-{task.name}.jsonl", Row)
    held = results.rows()
    devices.wait()  # no process writes a row before all have read the file
    facts = environment(seed=study.seeds[0], device=devices.device)
    check_one_machine([facts], [row.environment for row in held], "this run", str(results.path))
    if held and devices.is_main:
        console.print(
            f"attnzoo: {results.path} holds {len(held)} rows, which are kept", soft_wrap=True
        )
    work = Run(study, devices, held, results.append, folder / "checkpoints", facts)
    try:
        with progress_on(console) as progress:
            rows, interrupted = work.run(progress if devices.is_main else lambda *_: None), False
    except KeyboardInterrupt:
        rows, interrupted = list(work.rows.values()), True
        if not rows:
            raise
    if devices.is_main:
        _show(rows, folder / f"train-{task.name}.json")
        if interrupted:
            console.print(
                f"attnzoo: interrupted; finished runs are in {results.path}, and the same command "
                "goes on from there",
                soft_wrap=True,
            )
        else:
            console.print(
                f"finished in {time.monotonic() - started:.0f} s; figures: attnzoo report "
                f"{results.path}",
                soft_wrap=True,
            )
    return INTERRUPTED if interrupted else 0


TRAIN = Command(
    "train",
    "Train attentions on a small task that tells them apart, each with several seeds and learning "
    "rates.",
    add_arguments,
    run,
)


def _study(settings: Namespace, task: type[Task]) -> Study:
    """The task's study, with what the command line says in place of its own."""
    from attnzoo.configuration import configs_folder
    from attnzoo.training.training_study import read_study

    path = (
        configs_folder() / "tasks" / f"{task.name}.yaml"
        if settings.config is None
        else Path(settings.config)
    )
    overrides: dict[str, Any] = {
        name: settings[name]
        for name in ("variants", "learning_rates", "seeds")
        if settings[name] is not None
    }
    if settings.problem is not None:
        overrides["problem"] = dict(
            _knob(settings.problem, part) for part in settings.problem.split(",")
        )
    if settings.steps is not None:
        overrides["budget"] = {"steps": settings.steps}
    return read_study(path, settings.size, task, overrides, parse_variant)


def _knob(text: str, part: str) -> tuple[str, int]:
    name, _, value = part.partition("=")
    try:
        return name.strip(), int(value)
    except ValueError:
        raise ValueError(
            f"--problem {text}: {part!r} is not of the form knob=number; write "
            "knob=number,knob=number"
        ) from None


def _show(rows: list[Row], path: Path) -> None:
    """Print the tables, and write them as JSON."""
    from rich.text import Text

    from attnzoo.report.tables import rich_table
    from attnzoo.report.training.train_tables import problem_tables
    from attnzoo.training.summary import summed_up

    problems = summed_up(rows)
    for table in problem_tables(problems):
        screen().print(Text(table.title, style="bold"))
        screen().print(rich_table(table))
        for note in (*table.notes, table.formula):
            screen().print(Text(note, style="dim"))
        screen().print()
    write_text(
        path,
        json.dumps([problem.to_json() for problem in problems], indent=1, ensure_ascii=False)
        + "\n",
    )
    screen().print(f"wrote {path}", soft_wrap=True)
