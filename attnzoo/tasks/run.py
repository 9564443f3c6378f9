"""Running a study: every run is one row, written as it finishes, and none is made that the file already holds."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from attnzoo.report.columns import duration
from attnzoo.tasks.contenders import Contender
from attnzoo.tasks.devices import Devices
from attnzoo.tasks.loop import Setup, step_bytes, train
from attnzoo.tasks.model import Transformer
from attnzoo.tasks.rows import Key, Row
from attnzoo.tasks.study import Study
from attnzoo.tasks.task import TEST, Task

Progress = Callable[[str, int, int], None]
PAUSE = 2.0  # seconds between two reports of a run


class Run:
    """One study. held: rows of an earlier run, which are not trained again. write: gets every new row. checkpoints: the folder of unfinished
    runs, one file each. facts: the environment, kept in every new row."""

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
        self.study, self.devices, self.write, self.checkpoints, self.facts = study, devices, write, checkpoints, facts
        self.held: dict[Key, Row] = {row.key: row for row in held}
        self.rows: dict[Key, Row] = {}
        runs = len(study.learning_rates) + len(study.seeds) - 1
        self.steps = runs * study.budget.steps  # of a contender
        self.started, self.trained = time.monotonic(), 0  # for the time left: steps that were trained, not held

    def run(self, progress: Progress) -> list[Row]:
        """All rows of the study. progress: called with (the run, its loss and the time left; steps done; steps in all)."""
        pairs = list(itertools.product(self.study.problems, self.study.contenders))
        total = len(pairs) * self.steps
        for problem in self.study.problems:
            self._add_baselines(problem)
        for number, (problem, contender) in enumerate(pairs):
            before = number * self.steps

            def report(said: str, steps: int, before: int = before) -> None:
                left = (time.monotonic() - self.started) / max(self.trained, 1) * (total - before - steps)
                progress(f"{said}, {duration(left)} left", before + steps, total)

            self._contend(problem, contender, report)
        progress("done", total, total)
        return list(self.rows.values())

    def _contend(self, problem: Task, contender: Contender, progress: Callable[[str, int], None]) -> None:
        """The first seed at every rate, then the others at the rate that was best on validation."""
        blank, steps = self._blank(problem, contender.label, contender), self.study.budget.steps
        reason = self._cannot(problem, contender)
        if reason is not None:
            self._keep(replace(blank, reason=reason))
            return
        tried = []
        for rate in self.study.learning_rates:
            tried.append(self._train(blank, self._setup(problem, contender, rate, self.study.seeds[0]), progress, len(tried) * steps))
        best = best_of(tried, problem.lower_is_better)
        if best is None or best.learning_rate is None:
            return
        for number, seed in enumerate(self.study.seeds[1:], len(tried)):
            self._train(blank, self._setup(problem, contender, best.learning_rate, seed), progress, number * steps)

    def _train(self, blank: Row, setup: Setup, progress: Callable[[str, int], None], before: int) -> Row:
        row = replace(blank, learning_rate=setup.learning_rate, seed=setup.seed)
        if row.key in self.held:
            return self._keep(self.held[row.key])
        told = f"{setup.task.name} {_knobs(setup.task)}: {row.label}, rate {setup.learning_rate:g}, seed {setup.seed}"
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
            reason="" if stopped is None else f"the loss, of training or held-out examples, or its gradient was not finite at step {stopped}",
        )
        self._keep(row)
        if self.devices.is_main:
            path.unlink(missing_ok=True)
        self.devices.wait()
        return row

    def _keep(self, row: Row) -> Row:
        """The held row with its key, or this one, which is then written."""
        found = self.held.get(row.key)
        if found is None:
            found = replace(row, environment=self.facts)
            if self.devices.is_main:
                self.write(found)
        self.rows[row.key] = found
        return found

    def _add_baselines(self, problem: Task) -> None:
        blank = self._blank(problem, "", None)
        held = {row.label: row for row in self.held.values() if row.is_baseline and row.group == blank.group}
        scores = {label: row.test for label, row in held.items()} or problem.baselines(self.study.held_out)
        for label, score in scores.items():
            self._keep(replace(blank, label=label, test=score))

    def _cannot(self, problem: Task, contender: Contender) -> str | None:
        """Why the contender cannot do the task, tried on one sequence of it; None when it can."""
        try:
            with torch.no_grad():
                Transformer(problem, contender, self.study.sizes, 0)(problem.held_out(TEST, 1))
        except ValueError as error:
            return str(error).splitlines()[0]
        return None

    def _peak_bytes(self, setup: Setup) -> int | None:
        """Of one training step, from a row of the same contender where there is one."""
        same = [row for row in self.rows.values() if row.peak_bytes and row.group == self._blank(setup.task, "", None).group]
        known = next((row.peak_bytes for row in same if row.label == setup.contender.label), None)
        return known or step_bytes(setup, self.devices)

    def _setup(self, problem: Task, contender: Contender, learning_rate: float, seed: int) -> Setup:
        return Setup(problem, contender, self.study.sizes, self.study.budget, self.study.held_out, learning_rate, seed)

    def _blank(self, problem: Task, label: str, contender: Contender | None) -> Row:
        return Row(
            task=problem.name,
            problem=asdict(problem),  # type: ignore[call-overload]  # every task is a dataclass
            model=asdict(self.study.sizes),
            budget=asdict(self.study.budget),
            held_out=self.study.held_out,
            metric=problem.metric,
            label=label,
            layers=[] if contender is None else [[part.name, dict(part.options)] for part in contender.parts],
        )


def best_of(rows: Iterable[Row], lower_is_better: bool) -> Row | None:
    """The row with the best validation, of equal ones the one with the smaller loss; None when no run ended well."""
    ended = [row for row in rows if row.validation is not None and row.validation_loss is not None]
    sign = 1 if lower_is_better else -1
    return min(ended, key=lambda row: (sign * (row.validation or 0.0), row.validation_loss), default=None)


def _knobs(problem: Task) -> str:
    return " ".join(f"{name}={getattr(problem, name)}" for name in problem.knobs())


def _file_name(told: str) -> str:
    """A name that a file may have, and that no other run has."""
    return re.sub(r"[^\w.=-]+", "-", told) if len(told) < 120 else hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
