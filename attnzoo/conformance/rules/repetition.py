"""What a callable must do again: the same answer, alone or in a batch, whole or in pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.conformance.judged_callable import NotApplicable, Subject, asked
from attnzoo.conformance.rules.rule import Broken, Rule, compare, gradients
from attnzoo.conformance.rules.values import leaves_of
from attnzoo.conformance.trial_call import Given, Trial, upstream_of

PIECES = (3, 1, 1, 5)  # tokens of the first steps; the last takes the rest


def determinism(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    first, second = subject.rows(given), subject.rows(given)
    if not torch.equal(first, second):
        error = (first - second).abs().max().item()
        raise Broken(f"the same call twice gives rows that differ by up to {error:.3g}")
    return ""


def batch_invariance(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    rows, exact = subject.rows(given), True
    for sample in range(trial.batch_size):
        one = slice(sample, sample + 1)
        alone = subject.rows(given.select(one))
        compare(rows[one], alone, subject.tolerance, f"sample {sample} beside its run alone")
        exact &= torch.equal(rows[one], alone)
    return "bit for bit" if exact else "to rounding"


def double_use(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    before = {name: x.clone() for name, x in given.tensors().items()}
    subject.rows(given)
    _check_unwritten(given.tensors(), before)
    own, leaves = leaves_of(given)
    once = subject.rows(own)
    _check_unwritten(leaves, before)
    upstream = upstream_of(once)
    single = gradients(once, upstream, leaves)
    both = gradients(subject.rows(own) + subject.rows(own), upstream, leaves)
    for name in leaves:
        compare(
            both[name],
            2 * single[name],
            8 * subject.tolerance,
            f"the gradient of {name} of two calls in one graph",
        )
    return ""


def _check_unwritten(leaves: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, x in leaves.items():
        if not torch.equal(x.detach(), before[name]):
            raise Broken(f"the call writes to {name}")


def pieces_and_steps(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    rows, _ = _in_steps(subject, given, _lengths(trial.key_length))
    compare(rows, subject.rows(given), subject.tolerance, "in steps, a row beside the whole run")
    return ""


def going_back(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    length = trial.key_length
    end = length - 3
    if end < 1:
        return ""
    first = given.select(keys=slice(0, end), queries=slice(0, end))
    wrong = first.mapped(lambda name, x: x.flip(0) if name in ("q", "k", "v") else x)
    _, state = _in_steps(subject, first, [end])
    last = slice(0, min(2, end))
    _, state = _stepped(subject, wrong.select(keys=last, queries=last), state)
    crop = getattr(state, "crop", None)
    if crop is None:
        raise NotApplicable("its state has no crop")
    tokens = slice(end, length)
    state = asked(crop, int(last.stop))
    rows, _ = _stepped(subject, given.select(keys=tokens, queries=tokens), state)
    compare(
        rows,
        subject.rows(given)[:, :, end:],
        subject.tolerance,
        "after two tokens are taken back, a row beside the whole run",
    )
    return ""


def _lengths(length: int) -> list[int]:
    found, left = [], length
    for piece in PIECES:
        if left > piece:
            found.append(piece)
            left -= piece
    return [*found, left]


def _in_steps(subject: Subject, given: Given, lengths: list[int]) -> tuple[Tensor, Any]:
    function: Any = subject.function
    if not (hasattr(function, "step") and hasattr(function, "init_state")):
        raise NotApplicable("it has no init_state and step")
    spec = getattr(function, "spec", None)
    if spec is not None and not spec.decodes:
        raise NotApplicable("it does not decode")
    state = asked(
        function.init_state,
        given.q.shape[0],
        kv_heads=given.k.shape[1],
        dtype=given.q.dtype,
        device=subject.device,
    )
    rows, start = [], 0
    for length in lengths:
        tokens = slice(start, start + length)
        found, state = _stepped(subject, given.select(keys=tokens, queries=tokens), state)
        rows.append(found)
        start += length
    return torch.cat(rows, 2), state


def _stepped(subject: Subject, given: Given, state: Any) -> tuple[Tensor, Any]:
    function: Any = subject.function
    moved = given.on(subject.device)
    rows, state = asked(function.step, moved.q, moved.k, moved.v, state, **moved.inputs)
    return rows.cpu(), state


CAUSAL = (Trial(14, 14, is_causal=True), Trial(9, 9, is_causal=True, kv_heads=2, seed=1))
RULES = (
    Rule("determinism", "The same call gives the same bits.", determinism, (Trial(33, 33),)),
    Rule(
        "batch invariance",
        "A sample's rows do not depend on what else is in the batch.",
        batch_invariance,
        (Trial(batch_size=3), Trial(33, 33, batch_size=3)),
    ),
    Rule(
        "double use",
        "A call leaves its tensors as they are, and two calls add up their gradients.",
        double_use,
        (Trial(), Trial(padding="right")),
    ),
    Rule(
        "pieces and steps",
        "Prefill in pieces and steps of one token give the rows of the whole run.",
        pieces_and_steps,
        CAUSAL,
        causal=True,
    ),
    Rule(
        "going back",
        "Tokens that are taken back leave no trace.",
        going_back,
        CAUSAL[:1],
        causal=True,
    ),
)
