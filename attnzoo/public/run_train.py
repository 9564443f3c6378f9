"""`attnzoo.train`: attentions trained on a small task that tells them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from attnzoo.configuration import configs_folder
from attnzoo.public.setting_checks import given, listed
from attnzoo.public.variant_text import Variant, parse_variant, written
from attnzoo.results.output import check_folder, open_results
from attnzoo.results.progress import progress_bar, say

if TYPE_CHECKING:
    import torch

    from attnzoo.report.result import Result


def train(
    task: str,
    variants: Variant | Iterable[Variant] | None = None,
    *,
    size: str = "quick",
    problem: Mapping[str, int] | str | None = None,
    steps: int | None = None,
    learning_rates: float | Iterable[float] | None = None,
    seeds: int | Iterable[int] | None = None,
    device: str | torch.device = "cpu",
    config: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Train one small transformer with one attention after another, and compare their scores.

    task: mqar, copy, induction, needle, lookup, listops, pixels, shakespeare, parity or
    permutations.
    variants: such as "sliding_window:window=16", "gru", or "linear+standard" for layers that take
    turns, or a list; default: those of the task's study.
    size: quick (under 5 minutes on 2 cores), cpu or gpu of the study.
    problem: knobs of the task, such as {"pairs": 16, "length": 128}.
    steps: training steps of a run.
    learning_rates: all tried with every seed; the one with the best mean on validation counts.
    seeds: of the start and of the order of the examples.
    device: cpu, cuda or cuda:INDEX.
    config: a YAML file in the place of the shipped study.
    output: a folder whose train-TASK.jsonl gets each run as it ends, with checkpoints of those that
    have not; what it holds is not trained again.
    progress: say on standard error what is trained.

    Ctrl-C ends it early with the runs that were finished, which `Result.interrupted` says.

    Raises ValueError, one sentence, before any work, on a setting that is not allowed.
    """
    overrides = overrides_of(
        None if variants is None else written(variants),
        problem,
        steps,
        None if learning_rates is None else listed(learning_rates),
        None if seeds is None else listed(seeds),
    )
    return train_study(task, size, config, overrides, str(device), output, progress).result


def overrides_of(
    variants: list[str] | None,
    problem: Mapping[str, int] | str | None,
    steps: int | None,
    learning_rates: list[float] | None,
    seeds: list[int] | None,
) -> dict[str, Any]:
    """What is given, by the keys of a study. Raises ValueError on a problem that is no KNOB=NUMBER
    list."""
    return given(
        variants=variants,
        learning_rates=learning_rates,
        seeds=seeds,
        problem=_knobs(problem) if isinstance(problem, str) else problem,
        budget=None if steps is None else {"steps": steps},
    )


@dataclass(frozen=True)
class Trained:
    """What a study came to.

    file: the rows' own; None where no file gets them.
    is_main: whether this process, of several, is the one that talks.
    """

    result: Result
    file: Path | None
    is_main: bool


def train_study(
    task: str,
    size: str,
    config: str | Path | None,
    overrides: dict[str, Any],
    device: str,
    output: str | Path | None,
    progress: bool,
) -> Trained:
    """Check everything and train what the result file does not hold.

    overrides: settings of the study, by its keys.
    Raises KeyboardInterrupt when nothing was finished before Ctrl-C.
    """
    from attnzoo.benchmarking.bench_rows import check_one_machine
    from attnzoo.benchmarking.environment import environment
    from attnzoo.fidelity import check_device
    from attnzoo.report.training.train_page import training_result
    from attnzoo.tasks.task_names import find_task
    from attnzoo.training.devices import Devices
    from attnzoo.training.training_rows import Row
    from attnzoo.training.training_run import Run
    from attnzoo.training.training_study import read_study

    kind = find_task(task)
    path = configs_folder() / "tasks" / f"{kind.name}.yaml" if config is None else Path(config)
    study = read_study(path, size, kind, overrides, parse_variant)
    devices = Devices(check_device(device), study.budget.precision)
    place = TemporaryDirectory() if output is None else nullcontext(str(check_folder(output)))
    with place as folder:
        results = open_results(Path(folder) / f"train-{kind.name}.jsonl", Row)
        held = results.rows()
        devices.wait()  # no process writes a row before all have read the file
        facts = environment(seed=study.seeds[0], device=devices.device)
        check_one_machine([facts], [row.environment for row in held], "this run", str(results.path))
        if held and devices.is_main:
            say(f"attnzoo: {results.path} holds {len(held)} rows, which are kept")
        work = Run(study, devices, held, results.append, Path(folder) / "checkpoints", facts)
        cut = ""
        try:
            with progress_bar(progress and devices.is_main) as shown:
                rows = work.run(shown)
        except KeyboardInterrupt:
            rows, cut = list(work.rows.values()), "interrupted"
            if not rows:
                raise
    return Trained(
        training_result(rows, cut), None if output is None else results.path, devices.is_main
    )


def _knobs(text: str) -> dict[str, int]:
    """The knobs of KNOB=NUMBER,KNOB=NUMBER. Raises ValueError."""
    return dict(_knob(text, part) for part in text.split(","))


def _knob(text: str, part: str) -> tuple[str, int]:
    name, _, value = part.partition("=")
    try:
        return name.strip(), int(value)
    except ValueError:
        raise ValueError(
            f"--problem {text}: {part!r} is not of the form knob=number; write "
            "knob=number,knob=number"
        ) from None
