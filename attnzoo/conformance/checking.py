"""Run the rules over a callable, and make what fails small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from attnzoo.arguments import check_choice, check_positive
from attnzoo.conformance.findings import Finding, Report
from attnzoo.conformance.judged_callable import NotApplicable, Refused, Subject
from attnzoo.conformance.rules import absence, costs, repetition, values
from attnzoo.conformance.rules.rule import Broken, Rule
from attnzoo.conformance.trial_call import Trial
from attnzoo.conventions.dialects.spoken import find_dialect
from attnzoo.registry import Choice

#: Every rule, in the order of reports.
RULES: tuple[Rule, ...] = (*values.RULES, *absence.RULES, *repetition.RULES, *costs.RULES)
SHRINKINGS = 60  # calls at most that are tried to make a failing one small


def check(
    function: Callable[..., Any],
    like: str | Choice | None = None,
    *,
    dialect: str = "attnzoo",
    rules: Iterable[str] | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str], None] = lambda rule: None,
    **options: Any,
) -> Report:
    """Whether a callable is the attention that it should be, rule by rule.

    function: any callable: a function, a module, an operator of another library
    like: the variant whose oracle says what its rows are, by name, or with its options as a
        `attnzoo.registry.Choice`; None: only what every attention holds to is asked, such as
        causality and the absence of padding
    dialect: how it is called, a name of `attnzoo.conventions.dialects.spoken.DIALECTS`
    rules: names of the rules to ask; None: all
    heads, head_dim: of a callable that takes no others; None: it takes any
    device: where its tensors are
    seed: draws the tensors
    progress: is told the name of each rule before it is tried
    options: of a variant given by name, such as window=128; one that has the name of an argument
        here, as `seed` has, goes into a `Choice`
    returns: what was found, with the smallest call that shows each failure
    raises: ValueError on an unknown variant, option, dialect or rule, and on a callable that the
        dialect cannot call
    """
    if not callable(function) or (isinstance(function, type)):
        raise ValueError(
            f"check takes a callable that attends, such as a function or a module; got {function!r}"
            + (", a class: give an instance of it" if isinstance(function, type) else "")
        )
    if options and not isinstance(like, str):
        raise ValueError(
            f"the options {', '.join(options)} belong to a variant; say which one with like=NAME"
        )
    for name, size in (("heads", heads), ("head_dim", head_dim)):
        if size is not None:
            check_positive(name, size)
    spoken = find_dialect(dialect)
    if spoken.sizes is not None:
        spoken.sizes(function)  # whatever is wrong is said now
    choice = Choice(like, options) if isinstance(like, str) else like
    if choice is not None:
        choice.build(heads or 4, head_dim or 8, max_length=64)
    asked = RULES if rules is None else [_rule(name) for name in rules]
    subject = Subject(function, spoken, choice, heads, head_dim, device)
    training = isinstance(function, nn.Module) and function.training
    if isinstance(function, nn.Module):
        function.eval()
    try:
        findings = []
        for rule in asked:
            progress(rule.name)
            findings.append(judge(rule, subject, seed))
    finally:
        if isinstance(function, nn.Module):
            function.train(training)
    called = getattr(function, "__qualname__", type(function).__name__)
    return Report(called, "" if choice is None else choice.label, dialect, tuple(findings))


def judge(rule: Rule, subject: Subject, seed: int = 0) -> Finding:
    """What is found of one rule, in every direction that it is about."""
    status, reasons, calls = "not applicable", [], 0
    measured: list[str | float] = []
    for trial in trials_of(rule, subject, seed):
        calls += 1
        try:
            measured.append(rule.judge(subject, trial))
            status = "holds"
        except Broken as broken:
            smallest, why = trial, str(broken)
            if rule.shrinks:
                smallest, why = shrunk(rule, subject, trial, why)
            return Finding(rule.name, rule.says, "fails", why, str(smallest), calls)
        except (Refused, NotApplicable) as refused:
            status = "refused" if isinstance(refused, Refused) and status != "holds" else status
            reasons.append(str(refused))
    if status == "holds":
        if reasons:
            measured.append(f"{len(reasons)} of {calls} calls are left out: {reasons[0]}")
        return Finding(rule.name, rule.says, "holds", _said(measured, rule.unit), "", calls)
    reason = reasons[0] if reasons else "there is no such call"
    return Finding(rule.name, rule.says, status, reason, "", calls)


def trials_of(rule: Rule, subject: Subject, seed: int) -> list[Trial]:
    """The calls to try, each in every direction that the rule and the variant allow."""
    forms = [form for form in subject.forms if form or not rule.causal]
    found = []
    for trial in rule.trials:
        for form in forms:
            square = trial.query_length == trial.key_length
            if square or subject.spec is None or subject.spec.cross:
                one = replace(trial, is_causal=form, seed=trial.seed + seed)
                found.append(subject.fitting(one))
    return list(dict.fromkeys(found))


def shrunk(rule: Rule, subject: Subject, trial: Trial, why: str) -> tuple[Trial, str]:
    """The smallest call found that still breaks the rule, and how."""
    left = SHRINKINGS
    while True:
        for smaller in map(subject.fitting, trial.smaller()):
            if smaller == trial:
                continue
            if left == 0:
                return trial, why
            left -= 1
            try:
                rule.judge(subject, smaller)
            except Broken as broken:
                trial, why = smaller, str(broken)
                break
            except (Refused, NotApplicable):
                continue
        else:
            return trial, why


def _rule(name: str) -> Rule:
    names = [rule.name for rule in RULES]
    return RULES[names.index(check_choice("rule", name, names))]


def _said(measured: list[str | float], unit: str) -> str:
    """What was measured: the largest number, and words, the worst of those that say how exactly a
    rule holds."""
    numbers = [one for one in measured if isinstance(one, float)]
    told = list(dict.fromkeys(one for one in measured if isinstance(one, str) and one))
    if "bit for bit" in told and "to rounding" in told:
        told.remove("bit for bit")
    if numbers:
        told.insert(0, f"{max(numbers):.2g} {unit}")
    return "; ".join(told)
