"""What the rows and gradients are, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conformance.judged_callable import NotApplicable, Subject
from attnzoo.conformance.rules.rule import Broken, Rule, compare, gradients, place
from attnzoo.conformance.trial_call import Given, Trial, upstream_of


def leaves_of(given: Given) -> tuple[Given, dict[str, Tensor]]:
    """The call with tensors that ask for gradients, and these by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.tensors().items()}
    return given.mapped(lambda name, _: leaves[name]), leaves


def rows_equal(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    compare(subject.rows(given), subject.expected(given), subject.tolerance, "the rows")
    return ""


def any_length(subject: Subject, trial: Trial) -> str:
    """Where nothing says what the rows are, that there are finite ones."""
    if subject.like is not None:
        return rows_equal(subject, trial)
    rows = subject.rows(subject.given(replace(trial, dtype=subject.dtype)))
    if not bool(rows.isfinite().all()):
        raise Broken(f"{place(~rows.isfinite())} is not finite")
    return ""


def long_rows_equal(subject: Subject, trial: Trial) -> str:
    """At lengths at which chunks, windows and blocks end; says so where none leaves a key out."""
    given = subject.given(replace(trial, dtype=subject.dtype))
    compare(subject.rows(given), subject.expected(given), subject.tolerance, "the rows")
    if trial.key_length < LONGEST or subject.leaves_out(given):
        return ""
    assert subject.like is not None  # else nothing is expected
    return f"up to {LONGEST} tokens {subject.like.label} leaves no key out: give it smaller options"


def any_memory_layout(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    compare(
        subject.rows(given.mapped(lambda _, x: x.mT.contiguous().mT if x.dim() > 3 else x)),
        subject.rows(given),
        subject.tolerance,
        "of tensors whose width is not last in memory, the rows",
    )
    return ""


def gradients_equal(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    own, leaves = leaves_of(given)
    exact, exact_leaves = leaves_of(given.mapped(lambda _, x: x.double()))
    out, expected = subject.rows(own), subject.expected(exact)
    found = gradients(out, upstream_of(out), leaves)
    wanted = gradients(expected, upstream_of(expected), exact_leaves)
    for name, gradient in found.items():
        compare(gradient, wanted[name], 8 * subject.tolerance, f"the gradient of {name}")
    return ""


def final_state_equals(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    expected = subject.expected_state(given)
    found = subject.final_state(given, tuple(expected.shape))
    compare(found, expected, subject.tolerance, "the final state")
    return ""


def grouped_heads(subject: Subject, trial: Trial) -> str:
    """Against the oracle, or where there is none, the same heads written out."""
    given = subject.given(replace(trial, dtype=subject.dtype))
    group = trial.heads // trial.kv_heads
    what = f"the rows of {group} query heads on each key head"
    if group == 1:
        raise NotApplicable("it has as many key heads as query heads")
    if subject.like is not None:
        compare(subject.rows(given), subject.expected(given), subject.tolerance, what)
        return ""
    axes = {"k": ("batch", "kv_heads"), "v": ("batch", "kv_heads"), **given.axes}

    def spread(name: str, x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1) if "kv_heads" in axes.get(name, ()) else x

    written_out = subject.rows(given.mapped(spread))
    compare(subject.rows(given), written_out, subject.tolerance, what)
    return ""


def half_precision(subject: Subject, trial: Trial) -> float:
    given = subject.given(trial)
    expected = subject.expected(given).detach()
    allowed = (subject.reference(given).double() - expected).norm().item()
    if not bool(expected.isfinite().all()):
        raise NotApplicable("the oracle itself overflows on such tensors")
    rows = subject.rows(given)
    if not bool(rows.isfinite().all()):
        raise Broken(f"in {str(trial.dtype)[6:]}, {place(~rows.isfinite())} is not finite")
    error = (rows.double() - expected).norm().item()
    # The reference may be lucky: rounding the rows alone costs up to half a unit of each.
    least = torch.finfo(trial.dtype).eps / 4 * expected.norm().item()
    ratio = error / max(allowed, least)
    # Errors of roundings that know nothing of each other add up as squares.
    most = 2 * subject.dialect.roundings**0.5
    if not ratio <= most:
        raise Broken(
            f"the rows in {str(trial.dtype)[6:]} err {ratio:.3g} times as much as the reference "
            f"does at that precision (allowed is {most:.3g})"
        )
    return ratio


LONGEST = 200  # tokens of a call that is compared with the oracle
PLAIN = (
    Trial(),
    Trial(seed=1),
    Trial(query_length=4, key_length=11, kv_heads=4),
    Trial(query_length=20, key_length=20, batch_size=1),
)
LENGTHS = (1, 2, 3, 5, 7, 13, 17, 31, 33)
RULES = (
    Rule("outputs", "The rows are those of the oracle.", rows_equal, PLAIN),
    Rule(
        "gradients",
        "The gradients of q, k, v and every input are those of the oracle.",
        gradients_equal,
        PLAIN[::2],
    ),
    Rule(
        "final state",
        "The state after the last token, where one comes back, is that of the oracle.",
        final_state_equals,
        (Trial(), Trial(1, 1), Trial(67, 67, batch_size=1, heads=1, kv_heads=1)),
        causal=True,
    ),
    Rule(
        "odd lengths",
        "No length must be a multiple of anything.",
        any_length,
        tuple(Trial(n, n, batch_size=1, heads=2, kv_heads=2) for n in LENGTHS),
    ),
    Rule(
        "long inputs",
        "Rows are those of the oracle where chunks, windows and blocks end, and at usual widths.",
        long_rows_equal,
        (
            *(Trial(n, n, batch_size=1, heads=2, kv_heads=2) for n in (64, 65, 128, LONGEST)),
            Trial(130, 130, batch_size=1, heads=1, kv_heads=1, head_dim=64),
        ),
    ),
    Rule(
        "memory layout",
        "Rows do not depend on how tensors lie in memory.",
        any_memory_layout,
        (Trial(),),
    ),
    Rule(
        "grouped heads",
        "Query heads that share a key head read the same keys and values.",
        grouped_heads,
        (Trial(kv_heads=2), Trial(kv_heads=1, query_length=5, key_length=5)),
    ),
    Rule(
        "half precision",
        "The error is at most twice that of the reference at that precision.",
        half_precision,
        tuple(
            Trial(96, 96, batch_size=1, heads=2, kv_heads=2, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        shrinks=False,
        unit="x the reference's error",
    ),
)
