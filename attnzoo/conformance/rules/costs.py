"""What a call costs: memory as the length grows, and multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.conformance.judged_callable import NotApplicable, Refused, Subject
from attnzoo.conformance.rules.rule import Broken, Rule
from attnzoo.conformance.trial_call import Given, Trial
from attnzoo.cost.tracing.counting import count_flops

MEBIBYTE = 2**20
STEEPEST = 2.3  # powers of the length; A itself grows with the second


def memory_growth(subject: Subject, trial: Trial) -> str:
    """Peaks at the length and at twice that; of a forward pass."""
    if subject.device != "cpu":
        raise NotApplicable("it is measured on a CPU alone")
    peaks = []
    for length in (trial.key_length // 2, trial.key_length):
        given = subject.given(replace(trial, key_length=length, query_length=length))
        with torch.no_grad():
            subject.rows(given)  # what is made once and kept is made now
            peaks.append(peak_bytes(lambda given=given: subject.rows(given)))
    power = math.log2(max(peaks[1], 1) / max(peaks[0], 1))
    found = "causal: " if trial.is_causal else ""
    found += f"{peaks[1] / MEBIBYTE:.3g} MiB at {trial.key_length:,} tokens, as n^{power:.1f}"
    if power > STEEPEST:
        raise Broken(f"its peak memory is {found}, steeper than that of A itself")
    return found


class _Called(nn.Module):
    """A subject as a module, for a counter."""

    def __init__(self, subject: Subject, given: Given) -> None:
        super().__init__()
        self.subject, self.given = subject, given
        if isinstance(subject.function, nn.Module):
            self.function = subject.function

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.given.tensors(), tensors, strict=True))
        return self.subject.dialect.call(
            self.subject.function, self.given.mapped(lambda name, _: named[name])
        )


def macs(subject: Subject, trial: Trial) -> str:
    """As fvcore counts them, beside exact attention's own and this library's closed form."""
    given = subject.given(replace(trial, dtype=torch.float32))
    subject.rows(given)  # a refusal is no matter of the counter
    try:
        counted = count_flops(_Called(subject, given), *given.tensors().values()).macs
    except ModuleNotFoundError:
        raise Refused("fvcore is not installed: pip install 'attnzoo[cost]'") from None
    except Exception as error:  # a tracer follows less than runs
        raise Refused(f"it cannot be traced: {str(error).splitlines()[0]}") from None
    found = "causal: " if trial.is_causal else ""
    found += f"{counted:,} counted"
    if subject.like is not None:
        attn: Any = subject.like.build(trial.heads, trial.head_dim, max_length=trial.key_length)
        closed = attn.cost(
            trial.batch_size, trial.query_length, kv_heads=trial.kv_heads, is_causal=trial.is_causal
        )
        found += f", {closed.macs:,} here"
    return found


RULES = (
    Rule(
        "memory growth",
        "Peak memory grows no faster than A itself, with the square of the length.",
        memory_growth,
        (Trial(1024, 1024, 1, heads=2, kv_heads=2, dtype=torch.float32),),
        shrinks=False,
    ),
    Rule(
        "MACs",
        "Multiply-accumulates can be counted; they stand beside this library's own.",
        macs,
        (Trial(256, 256, 1, heads=2, kv_heads=2),),
        shrinks=False,
    ),
)
