"""One variant with its options, built for a sample and measured against exact attention on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.bench.peak_memory import peak_bytes
from attnzoo.fidelity.comparison_rows import Row, Sample
from attnzoo.fidelity.metrics import (
    exact_output,
    mean_value_output,
    relative_error,
    weight_distance,
)
from attnzoo.registry import build, options_of, sized

DRAWS = 3  # of a variant that can draw anew: its error is a mean over them


@dataclass(frozen=True)
class Candidate:
    """A variant's name and the options a user gave it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options in one line, such as "performer num_features=64"."""
        return " ".join(
            [self.name, *(f"{option}={value}" for option, value in self.options.items())]
        )

    def build(self, sample: Sample, length: int, seed: int) -> Attention:
        """The variant in evaluation mode, with the sample's heads, device and dtype, for sequences
        up to `length`.

        max_length and seed are given to a variant that takes them, unless the options hold them.
        Raises ValueError on a bad option.
        """
        fixed = {"heads": sample.q.shape[1], "head_dim": sample.q.shape[3]}
        given = sorted(fixed.keys() & self.options.keys())
        if given:
            raise ValueError(
                f"{self.name}: {' and '.join(given)} come from the model that is compared on; "
                "leave them out of the options"
            )
        offered = {"seed": seed, **sized(self.name, length)}
        known = {option.name for option in options_of(self.name)}
        supplied = {name: value for name, value in offered.items() if name in known}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attention = build(self.name, **fixed, **{**supplied, **self.options})
        return attention.eval().to(sample.q.device, sample.q.dtype)


#: Exact attention, which every error, cost and time is set against.
BASELINE = Candidate("standard")


@dataclass(frozen=True)
class Subject:
    """A sample with what exact attention gives on it, computed once."""

    sample: Sample

    @cached_property
    def exact(self) -> Tensor:
        sample = self.sample
        return exact_output(sample.q, sample.k, sample.v, is_causal=sample.is_causal)

    @cached_property
    def mean_value_error(self) -> float:
        sample = self.sample
        mean = mean_value_output(sample.v, sample.q.shape[1], is_causal=sample.is_causal)
        return float(relative_error(mean, self.exact).mean())

    @cached_property
    def exact_macs(self) -> int:
        sample = self.sample
        attention = BASELINE.build(sample, sample.length, 0)
        return attention.cost(
            sample.q.shape[0], sample.length, kv_heads=sample.k.shape[1], is_causal=sample.is_causal
        ).support_macs

    def prefix(self, length: int) -> Subject:
        """The first `length` tokens: for a causal model exactly what it computes on them."""
        sample = self.sample
        q, k, v = (x[:, :, :length] for x in (sample.q, sample.k, sample.v))
        return Subject(replace(sample, length=length, q=q, k=k, v=v))


def blank_row(candidate: Candidate, subject: Subject, note: str = "") -> Row:
    """The row before anything about the candidate is measured."""
    sample = subject.sample
    return Row(
        variant=candidate.name,
        options=dict(candidate.options),
        label=candidate.label,
        model=sample.model,
        is_causal=sample.is_causal,
        length=sample.length,
        mean_value_error=subject.mean_value_error,
        exact_macs=subject.exact_macs,
        note=note,
    )


@torch.no_grad()
def measure(candidate: Candidate, subject: Subject, *, seed: int, thorough: bool) -> Row:
    """Errors and costs of a candidate; what its spec excludes gives a row with a note. thorough: A
    itself and peak memory too."""
    sample = subject.sample
    row = blank_row(candidate, subject)
    try:
        attention = candidate.build(sample, sample.length, seed)
        found = [_distances(drawn, subject, thorough) for drawn in _draws(attention, seed)]
        macs = _macs(attention, sample)
        peak = (
            peak_bytes(
                lambda: attention(sample.q, sample.k, sample.v, is_causal=sample.is_causal),
                sample.q.device,
            )
            if thorough
            else None
        )
    except (ValueError, torch.OutOfMemoryError) as error:
        return replace(row, note=str(error).splitlines()[0])
    errors = torch.stack([errors for errors, _, _ in found])
    finite = bool(torch.isfinite(errors).all())
    row = replace(
        row,
        output_error=float(errors.mean()) if finite else None,
        output_error_spread=float(errors.std(unbiased=False)) if finite else None,
        total_variation=_mean([variation for _, variation, _ in found])
        if thorough and finite
        else None,
        top_mass_kept=_mean([kept for _, _, kept in found]) if thorough and finite else None,
        macs=macs,
        promised_speedup=subject.exact_macs / macs,
        peak_bytes=peak,
        backend=attention.last_backend,
    )
    return replace(row, note="; ".join(_notes(attention, row)))


def _distances(
    attention: Attention, subject: Subject, thorough: bool
) -> tuple[Tensor, float, float]:
    """Output error by layer and head, total variation, kept top mass; the last two are 0 when not
    thorough."""
    sample = subject.sample
    distance = (
        weight_distance(attention, sample.q, sample.k, is_causal=sample.is_causal)
        if thorough
        else None
    )
    errors = relative_error(
        attention(sample.q, sample.k, sample.v, is_causal=sample.is_causal), subject.exact
    )
    return (
        (errors, distance.total_variation, distance.top_mass_kept)
        if distance
        else (errors, 0.0, 0.0)
    )


def _draws(attention: Attention, seed: int) -> Iterator[Attention]:
    """The attention as built, then drawn anew if it can."""
    yield attention
    redraw: Callable[[], None] | None = getattr(attention, "redraw", None)
    if redraw is None:
        return
    for draw in range(1, DRAWS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + draw)
            redraw()
        yield attention


def _macs(attention: Attention, sample: Sample) -> int:
    return attention.cost(
        sample.q.shape[0], sample.length, kv_heads=sample.k.shape[1], is_causal=sample.is_causal
    ).kernel_macs


def _notes(attention: Attention, row: Row) -> Iterator[str]:
    untrained = sum(
        parameter.numel() for parameter in attention.parameters() if parameter.requires_grad
    )
    if untrained:
        yield f"untrained: {untrained:,} random parameters"
    if row.output_error is None:
        yield "NaN or inf in the output"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
