"""attnzoo train: attentions trained on small tasks that tell them apart, run by run into a result
file."""

from __future__ import annotations

import time
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands import INTERRUPTED
from attnzoo.commands.command import Command, add_variants, print_tables, screen, variants_of


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
        "too: recall against the size of the state",
    )
    parser.add_argument(
        "--config",
        type=str,
        metavar="FILE",
        help="a YAML file in the place of the shipped configs/tasks/TASK.yaml",
    )
    add_variants(
        parser,
        "those of the study; gru is a recurrent network, linear+standard are layers that take "
        "turns",
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
    from attnzoo.public.run_train import overrides_of, train_study
    from attnzoo.results.output import write_text
    from attnzoo.results.progress import say

    started = time.monotonic()
    overrides = overrides_of(
        variants_of(settings),
        **{name: settings[name] for name in ("problem", "steps", "learning_rates", "seeds")},
    )
    trained = train_study(
        settings.task,
        settings.size,
        settings.config,
        overrides,
        settings.device,
        settings.output,
        progress=True,
    )
    result, path = trained.result, trained.file
    if not trained.is_main:
        return INTERRUPTED if result.interrupted else 0
    print_tables(result.tables[:-1])
    for name, text in result.texts.items():
        screen().print(f"wrote {write_text(Path(settings.output) / name, text())}", soft_wrap=True)
    if result.interrupted:
        say(
            f"attnzoo: interrupted; finished runs are in {path}, and the same command goes on from "
            "there"
        )
        return INTERRUPTED
    say(f"finished in {time.monotonic() - started:.0f} s; figures: attnzoo report {path}")
    return 0


TRAIN = Command(
    "train",
    "Train attentions on a small task that tells them apart, each with several seeds and learning "
    "rates.",
    add_arguments,
    run,
)
