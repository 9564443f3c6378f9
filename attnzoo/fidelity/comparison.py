"""Every variant against exact attention, on every sample: errors, costs, times and pictures of
A."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from attnzoo.benchmarking.cuda_timing import stopwatch_of
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import interleave, mistake
from attnzoo.fidelity.comparison_rows import Comparison, HeatMap, Row, Sample
from attnzoo.fidelity.measure_variant import BASELINE, Subject, build_for, measure
from attnzoo.fidelity.metrics import pooled
from attnzoo.fidelity.samples import LENGTHS, Progress
from attnzoo.registry import Choice, names

HEAT_MAP_LENGTH, HEAT_MAP_CELLS = 512, 64
ROUNDS, TIME_BUDGET = 7, 20.0

Step = tuple[str, Callable[[], None]]


def compare(
    samples: Sequence[Sample],
    variants: Iterable[Choice] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = ROUNDS,
    time_budget: float = TIME_BUDGET,
    progress: Progress | None = None,
) -> Comparison:
    """Compare variants with exact attention on queries, keys and values.

    samples: the longest sample of each model gets a row per variant with everything measured.
    variants: default: the whole zoo.
    lengths: where the output error alone is measured too, up to the longest sample: on prefixes of
    a causal one, on the shorter samples given of a bidirectional one.
    seed: of every random choice.
    rounds: interleaved timing rounds.
    time_budget: seconds a sample after which none is begun.
    progress: called with (what is being done, steps done, steps).

    What a variant cannot do becomes a row with a note. Ctrl-C returns what is finished, and
    `environment["interrupted"]` says so.

    Raises ValueError, before any work, on an unknown variant or option, a device that is not there
    and a dtype that is not floating.
    """
    if not samples:
        raise ValueError("samples is empty; give at least one, such as those of load_samples()")
    if not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype} is not floating; use torch.float32, torch.bfloat16 or torch.float16"
        )
    target, choices = check_device(device), _choices(variants)
    for choice in choices:
        build_for(choice, samples[0], samples[0].length, seed)
    subjects = [Subject(_moved(sample, target, dtype)) for sample in samples]
    work = _Work(choices, seed, rounds, time_budget)
    steps = list(work.steps(subjects, lengths))
    facts = environment(seed=seed, device=target, dtype=dtype)
    stage, done = "", 0
    try:
        for done, (stage, step) in enumerate(steps):
            if progress is not None:
                progress(stage, done, len(steps))
            step()
        if progress is not None:
            progress("done", len(steps), len(steps))
    except KeyboardInterrupt:
        facts["interrupted"] = f"after {done} of {len(steps)} steps, at: {stage}"
    return Comparison(
        rows=tuple(work.rows.values()),
        heat_maps=tuple(work.heat_maps),
        by_length=tuple(sorted(work.by_length, key=lambda row: row.length)),
        environment=facts,
        samples=tuple(sample.summary() for sample in samples),
    )


class _Work:
    """Steps that each add to the results, so that an interrupted comparison keeps what was
    finished."""

    def __init__(self, choices: list[Choice], seed: int, rounds: int, time_budget: float) -> None:
        self.choices = choices
        self.seed = seed
        self.rounds = rounds
        self.time_budget = time_budget
        self.rows: dict[tuple[int, int], Row] = {}
        self.by_length: list[Row] = []
        self.heat_maps: list[HeatMap] = []

    def steps(self, subjects: list[Subject], lengths: Sequence[int]) -> Iterator[Step]:
        """What is to be done, in an order that gives the headline numbers first."""
        longest = _longest(subjects)
        for place, subject in enumerate(longest):
            where = f"{subject.sample.model} at {subject.sample.length:,}"
            for number, choice in enumerate(self.choices):
                yield (
                    f"{where}: {choice.label}",
                    lambda p=place, n=number, s=subject: self._measure(p, n, s),
                )
            yield (
                f"{where}: timing {len(self.choices)} variants",
                lambda p=place, s=subject: self._time(p, s),
            )
        for subject in longest:
            yield f"{subject.sample.model}: pictures of A", lambda s=subject: self._draw(s)
        for subject in longest:
            for shorter in _shorter(subject, subjects, lengths):
                yield (
                    f"{shorter.sample.model} at {shorter.sample.length:,}: errors",
                    lambda s=shorter: self._errors(s),
                )

    def _measure(self, place: int, number: int, subject: Subject) -> None:
        row = measure(self.choices[number], subject, seed=self.seed, thorough=True)
        self.rows[place, number] = row
        self.by_length.append(row)

    def _errors(self, subject: Subject) -> None:
        self.by_length += [
            measure(choice, subject, seed=self.seed, thorough=False) for choice in self.choices
        ]

    @torch.no_grad()
    def _time(self, place: int, subject: Subject) -> None:
        sample = subject.sample
        contenders = {BASELINE.label: self._forward(BASELINE, sample)}
        for number, choice in enumerate(self.choices):
            row = self.rows[place, number]
            if row.output_error is None:
                continue
            attention = build_for(choice, sample, sample.length, self.seed)
            attention(sample.q, sample.k, sample.v, is_causal=sample.is_causal)
            wrong = mistake(attention, sample.q, sample.k, sample.v, is_causal=sample.is_causal)
            if wrong is None:
                contenders[choice.label] = self._forward(choice, sample)
            else:
                self.rows[place, number] = replace(
                    row, note="; ".join(filter(None, [row.note, f"not timed: {wrong}"]))
                )
        timings = interleave(
            contenders,
            rounds=self.rounds,
            budget=self.time_budget,
            stopwatch=stopwatch_of(sample.q.device),
        )
        exact = timings[BASELINE.label].median
        for number, choice in enumerate(self.choices):
            timing = timings.get(choice.label)
            if timing is not None and self.rows[place, number].output_error is not None:
                self.rows[place, number] = replace(
                    self.rows[place, number],
                    seconds=timing.median,
                    seconds_quartiles=timing.quartiles,
                    rounds=len(timing.seconds),
                    speedup=exact / timing.median,
                )

    def _forward(self, choice: Choice, sample: Sample) -> Callable[[], object]:
        attention = build_for(choice, sample, sample.length, self.seed)
        return lambda: attention(sample.q, sample.k, sample.v, is_causal=sample.is_causal)

    @torch.no_grad()
    def _draw(self, subject: Subject) -> None:
        """Heat maps of the middle layer's first head over the first tokens, exact attention
        first."""
        sample = subject.sample
        length, layer = min(sample.length, HEAT_MAP_LENGTH), sample.q.shape[0] // 2
        q, k = (x[layer : layer + 1, :, :length] for x in (sample.q, sample.k))
        for choice in {choice.label: choice for choice in [BASELINE, *self.choices]}.values():
            try:
                weights = build_for(choice, sample, length, self.seed).weights(
                    q, k, is_causal=sample.is_causal
                )[0, 0]
            except ValueError:
                continue  # its row says why
            cells = pooled(weights.float(), HEAT_MAP_CELLS)
            if bool(torch.isfinite(cells).all()):
                self.heat_maps.append(
                    HeatMap(
                        label=choice.label,
                        model=sample.model,
                        is_causal=sample.is_causal,
                        length=length,
                        layer=sample.layers[layer],
                        head=sample.heads[0],
                        query_range=(0, length),
                        key_range=(0, length),
                        weights=tuple(tuple(round(x, 6) for x in row) for row in cells.tolist()),
                    )
                )


def _choices(variants: Iterable[Choice] | None) -> list[Choice]:
    chosen = [Choice(name) for name in names()] if variants is None else list(variants)
    if not chosen:
        raise ValueError(f"variants is empty; give at least one of {', '.join(names())}")
    distinct = {choice.label: choice for choice in chosen}
    return list(distinct.values())


def check_device(device: torch.device | str) -> torch.device:
    """The device that is asked for, with its index: torch.cuda.set_device takes no "cuda" alone.
    Raises ValueError when it is unknown, cannot be measured, or is not there."""
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is unknown; use cpu, cuda or cuda:INDEX") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(target)!r} cannot be measured; use cpu, cuda or cuda:INDEX")
    count = torch.cuda.device_count()
    if target.type == "cuda" and (target.index or 0) >= count:
        raise ValueError(
            f"device={str(target)!r} is not there: torch {torch.__version__} sees {count} CUDA "
            "devices; use cpu"
        )
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target


def _moved(sample: Sample, device: torch.device, dtype: torch.dtype) -> Sample:
    return replace(
        sample,
        q=sample.q.to(device, dtype),
        k=sample.k.to(device, dtype),
        v=sample.v.to(device, dtype),
    )


def _longest(subjects: list[Subject]) -> list[Subject]:
    """The longest subject of every model, in the order in which the models came."""
    longest: dict[tuple[str, bool], Subject] = {}
    for subject in subjects:
        key = (subject.sample.model, subject.sample.is_causal)
        if key not in longest or subject.sample.length > longest[key].sample.length:
            longest[key] = subject
    return list(longest.values())


def _shorter(longest: Subject, subjects: list[Subject], lengths: Sequence[int]) -> list[Subject]:
    """Subjects of the same model that are shorter, from short to long."""
    sample = longest.sample
    if sample.is_causal:
        return [longest.prefix(length) for length in sorted(set(lengths)) if length < sample.length]
    same = [
        subject
        for subject in subjects
        if (subject.sample.model, subject.sample.is_causal) == (sample.model, False)
    ]
    return sorted(
        (subject for subject in same if subject is not longest),
        key=lambda subject: subject.sample.length,
    )
