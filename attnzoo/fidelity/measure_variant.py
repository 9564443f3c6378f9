"""A variant built for a sample and measured against exact attention on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.fidelity.comparison_rows import Row, Sample
from attnzoo.fidelity.metrics import (
    WeightDistance,
    exact_output,
    mean_value_output,
    relative_error,
    weight_distance,
)
from attnzoo.registry import Choice

ROUNDING = 1e-6  # of A's mass: what may be below 0 by rounding
UNEVEN = 1e-3  # from 1: what the sum of a row may be by rounding, in half precision too
DRAWS = 3  # of a variant that can draw anew: its error is a mean over them


#: Exact attention, which every error, cost and time is set against.
BASELINE = Choice("standard")


def build_for(choice: Choice, sample: Sample, length: int, seed: int) -> Attention:
    """The choice in evaluation mode, with a sample's heads, device and dtype.

    length: tokens that it is built for.
    seed: of what it draws, unless the choice holds one.
    Raises ValueError on a bad option.
    """
    given = sorted({"heads", "head_dim"} & choice.options.keys())
    if given:
        raise ValueError(
            f"{choice.name}: {' and '.join(given)} come from the model that is compared on; "
            "leave them out of the options"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = choice.build(sample.q.shape[1], sample.q.shape[3], max_length=length, seed=seed)
    return attention.eval().to(sample.q.device, sample.q.dtype)


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
        attention = build_for(BASELINE, sample, sample.length, 0)
        return attention.cost(
            sample.q.shape[0], sample.length, kv_heads=sample.k.shape[1], is_causal=sample.is_causal
        ).support_macs

    def prefix(self, length: int) -> Subject:
        """The first `length` tokens: for a causal model exactly what it computes on them."""
        sample = self.sample
        q, k, v = (x[:, :, :length] for x in (sample.q, sample.k, sample.v))
        return Subject(replace(sample, length=length, q=q, k=k, v=v))


def blank_row(choice: Choice, subject: Subject, note: str = "") -> Row:
    """The row before anything about the choice is measured."""
    sample = subject.sample
    return Row(
        variant=choice.name,
        options=dict(choice.options),
        label=choice.label,
        model=sample.model,
        is_causal=sample.is_causal,
        length=sample.length,
        mean_value_error=subject.mean_value_error,
        exact_macs=subject.exact_macs,
        note=note,
    )


@torch.no_grad()
def measure(choice: Choice, subject: Subject, *, seed: int, thorough: bool) -> Row:
    """Errors and costs of a choice; what its spec excludes gives a row with a note.

    thorough: A itself and peak memory too.
    """
    sample = subject.sample
    row = blank_row(choice, subject)
    try:
        attention = build_for(choice, sample, sample.length, seed)
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
    errors = torch.stack([errors for errors, _ in found])
    distances = [distance for _, distance in found if distance is not None]
    finite = bool(torch.isfinite(errors).all())
    row = replace(
        row,
        output_error=float(errors.mean()) if finite else None,
        output_error_spread=float(errors.std(unbiased=False)) if finite else None,
        total_variation=_mean([one.total_variation for one in distances]) if finite else None,
        top_mass_kept=_mean([one.top_mass_kept for one in distances]) if finite else None,
        macs=macs,
        promised_speedup=subject.exact_macs / macs,
        peak_bytes=peak,
        backend=attention.last_backend,
    )
    return replace(row, note="; ".join(_notes(attention, row, distances)))


def _distances(
    attention: Attention, subject: Subject, thorough: bool
) -> tuple[Tensor, WeightDistance | None]:
    """Output error by layer and head, and how far A is from exact A where that is wanted."""
    sample = subject.sample
    distance = (
        weight_distance(attention, sample.q, sample.k, is_causal=sample.is_causal)
        if thorough
        else None
    )
    out = attention(sample.q, sample.k, sample.v, is_causal=sample.is_causal)
    return relative_error(out, subject.exact), distance


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


def _notes(attention: Attention, row: Row, distances: list[WeightDistance]) -> Iterator[str]:
    negative, row_sum = (
        _mean([getattr(one, name) for one in distances]) for name in ("negative", "row_sum")
    )
    gates = [one.name for one in attention.spec.inputs if one.is_projected]
    if gates:
        yield f"without {', '.join(gates)}, which a model learns"
    untrained = sum(
        parameter.numel() for parameter in attention.parameters() if parameter.requires_grad
    )
    if untrained:
        yield f"untrained: {untrained:,} random parameters"
    if row.output_error is None:
        yield "NaN or inf in the output"
    elif negative is not None and negative > ROUNDING:
        share = "under 1%" if negative < 0.01 else f"{negative:.0%}"
        yield f"A has entries below 0: {share} of its mass"
    elif row_sum is not None and abs(row_sum - 1) > UNEVEN:
        yield f"rows of A sum to {row_sum:.2g} on average, not to 1"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
