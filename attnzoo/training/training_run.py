"""Running a study: every run is one row, written as it finishes, and none is made that the file
already holds."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from attnzoo.results.units import duration
from attnzoo.tasks.task import TEST, Task
from attnzoo.training.contenders import Contender
from attnzoo.training.devices import Devices
from attnzoo.training.loop import Setup, step_bytes, train
from attnzoo.training.model import Sizes, Transformer
from attnzoo.training.training_rows import Key, Row
from attnzoo.training.training_study import Study

Progress = Callable[[str, int, int], None]
PAUSE = 2.0  # seconds between two reports of a run


class Run:
    """One study.

    held: rows of an earlier run, which are not trained again.
    write: gets every new row.
    checkpoints: the folder of unfinished runs, one file each.
    facts: the environment, kept in every new row.
    """

    def __init__(
        self,
        study: Study,
        devices: Devices,
        held: Iterable[Row],
        write: Callable[[Row], None],
        checkpoints: Path,
        facts: dict[str, str],
    ) -> None:
        devices.check_shares(batch_size=study.budget.batch_size, held_out=study.held_out)
        self.study, self.devices, self.write, self.checkpoints, self.facts = (
            study,
            devices,
            write,
            checkpoints,
            facts,
        )
        self.held: dict[Key, Row] = {row.key: row for row in held}
        self.rows: dict[Key, Row] = {}
        # The runs of a contender.
        self.grid = list(itertools.product(study.seeds, study.learning_rates))
        self.turned = [
            field.name
            for field in fields(Sizes)
            if len({getattr(sizes, field.name) for sizes in study.models}) > 1
        ]
        # The time left is estimated from the steps that this run trained.
        self.started, self.trained = (time.monotonic(), 0)

    def run(self, progress: Progress) -> list[Row]:
        """All rows of the study.

        progress: called with (the run, its loss and the time left; steps done; steps in all).
        """
        places = list(itertools.product(self.study.problems, self.study.models))
        for problem, sizes in places:
            self._add_baselines(problem, sizes)
        contests = [
            (problem, sizes, contender)
            for problem, sizes in places
            for contender in self.study.contenders
        ]
        steps_each = len(self.grid) * self.study.budget.steps
        total = len(contests) * steps_each
        for number, (problem, sizes, contender) in enumerate(contests):
            before = number * steps_each

            def report(said: str, steps: int, before: int = before) -> None:
                left = (
                    (time.monotonic() - self.started)
                    / max(self.trained, 1)
                    * (total - before - steps)
                )
                progress(f"{said}, {duration(left)} left", before + steps, total)

            self._contend(problem, sizes, contender, report)
        progress("done", total, total)
        return list(self.rows.values())

    def _contend(
        self,
        problem: Task,
        sizes: Sizes,
        contender: Contender,
        progress: Callable[[str, int], None],
    ) -> None:
        """Every seed at every rate."""
        blank = self._blank(problem, sizes, contender.label, contender)
        reason = _cannot(problem, sizes, contender)
        if reason is not None:
            self._keep(replace(blank, reason=reason))
            return
        for number, (seed, rate) in enumerate(self.grid):
            setup = Setup(
                problem, contender, sizes, self.study.budget, self.study.held_out, rate, seed
            )
            self._train(blank, setup, progress, number * self.study.budget.steps)

    def _train(
        self, blank: Row, setup: Setup, progress: Callable[[str, int], None], before: int
    ) -> None:
        row = replace(blank, learning_rate=setup.learning_rate, seed=setup.seed)
        if row.key in self.held:
            self._keep(self.held[row.key])
            return
        turned = "".join(f" {name}={getattr(setup.sizes, name)}" for name in self.turned)
        told = (
            f"{setup.task.name} {_knobs(setup.task)}{turned}: {row.label}, rate "
            f"{setup.learning_rate:g}, seed {setup.seed}"
        )
        last, path = time.monotonic() - PAUSE, self.checkpoints / f"{_file_name(told)}.pt"

        def report(steps: int, loss: float) -> None:
            nonlocal last
            self.trained += 1
            if time.monotonic() - last >= PAUSE:
                last = time.monotonic()
                progress(f"{told}: loss {loss:.3f}", before + steps)

        outcome = train(setup, self.devices, path, report)
        model = Transformer(setup.task, setup.contender, setup.sizes, setup.seed)
        stopped = outcome.stopped_at
        row = replace(
            row,
            validation=outcome.validation if stopped is None else None,
            validation_loss=outcome.validation_loss if stopped is None else None,
            test=outcome.test,
            curve=[list(point) for point in outcome.shown_curve()],
            validations=[list(point) for point in outcome.validations],
            stopped_at=stopped,
            seconds=outcome.seconds,
            macs=model.macs(setup.task.training_batch(1, setup.seed, 0).inputs.shape[1]),
            peak_bytes=self._peak_bytes(setup),
            state_bytes=model.state_bytes(),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            reason=""
            if stopped is None
            else "the loss, of training or held-out examples, or its gradient was not finite at "
            f"step {stopped}",
        )
        self._keep(row)
        if self.devices.is_main:
            path.unlink(missing_ok=True)
        self.devices.wait()

    def _keep(self, row: Row) -> None:
        """Take the held row with its key, or this one, which is then written."""
        found = self.held.get(row.key)
        if found is None:
            found = replace(row, environment=self.facts)
            if self.devices.is_main:
                self.write(found)
        self.rows[row.key] = found

    def _add_baselines(self, problem: Task, sizes: Sizes) -> None:
        blank = self._blank(problem, sizes, "", None)
        held = {
            row.label: row
            for row in self.held.values()
            if row.is_baseline and row.group == blank.group
        }
        scores = {label: row.test for label, row in held.items()} or problem.baselines(
            self.study.held_out
        )
        for label, score in scores.items():
            self._keep(replace(blank, label=label, test=score))

    def _peak_bytes(self, setup: Setup) -> int | None:
        """Of one training step, from a row of the same contender where there is one."""
        same = [
            row
            for row in self.rows.values()
            if row.peak_bytes and row.group == self._blank(setup.task, setup.sizes, "", None).group
        ]
        known = next((row.peak_bytes for row in same if row.label == setup.contender.label), None)
        return known or step_bytes(setup, self.devices)

    def _blank(self, problem: Task, sizes: Sizes, label: str, contender: Contender | None) -> Row:
        return Row(
            task=problem.name,
            problem=asdict(problem),  # type: ignore[call-overload]  # every task is a dataclass
            model=sizes.to_json(),
            budget=asdict(self.study.budget),
            held_out=self.study.held_out,
            metric=problem.metric,
            label=label,
            layers=[]
            if contender is None
            else [[part.name, dict(part.options)] for part in contender.parts],
        )


def _cannot(problem: Task, sizes: Sizes, contender: Contender) -> str | None:
    """Why the contender cannot do the task, tried on one sequence of it; None when it can."""
    try:
        with torch.no_grad():
            Transformer(problem, contender, sizes, 0)(problem.held_out(TEST, 1))
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def _knobs(problem: Task) -> str:
    return " ".join(f"{name}={getattr(problem, name)}" for name in problem.knobs())


def _file_name(told: str) -> str:
    """A name that a file may have, and that no other run has."""
    return (
        re.sub(r"[^\w.=-]+", "-", told)
        if len(told) < 120
        else hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    )
