"""What must not be seen, and what must: the future, padding, other pieces of a packed row, and NaN
in these; the own token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conformance.judged_callable import NotApplicable, Subject
from attnzoo.conformance.rules.rule import Broken, Rule, compare, gradients, place
from attnzoo.conformance.rules.values import leaves_of
from attnzoo.conformance.trial_call import Given, Trial

NAN = float("nan")


def causality(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    first = trial.key_length - trial.query_length
    token = first + max(1, trial.query_length * 2 // 3)
    if token >= trial.key_length:
        return ""
    before = token - first
    clean, changed = subject.rows(given), subject.rows(given.changed(token, 50.0))
    compare(
        changed[:, :, :before],
        clean[:, :, :before],
        subject.tolerance,
        f"when token {token} changes, an earlier row",
    )
    own, leaves = leaves_of(given)
    out = subject.rows(own)[:, :, :before]
    found = gradients(out, torch.ones_like(out), leaves)
    for name in ("k", "v"):
        later = found[name][:, :, token:]
        if later.abs().max() > subject.tolerance:
            raise Broken(f"rows before token {token} send a gradient to {name} from it on")
    exact = torch.equal(changed[:, :, :before], clean[:, :, :before])
    return "bit for bit" if exact else "to rounding"


def alignment(subject: Subject, trial: Trial) -> str:
    """By A, a column at a time: the rows of values that are 1 at one token and 0 at all others."""
    given = subject.given(replace(trial, dtype=subject.dtype))
    first = trial.key_length - trial.query_length
    columns = [subject.rows(_value_of(given, token)) for token in range(trial.key_length)]
    weights = torch.stack([column[..., 0] for column in columns], -1)
    read = (weights.abs() > subject.tolerance).flatten(0, 1)  # of each head, (queries, keys)
    for row in range(trial.query_length):
        own, tokens = first + row, read[:, row].any(0).nonzero()[:, 0].tolist()
        stands = f"row {row} of {trial.query_length}, which stands "
        stands += f"at token {own}," if own >= 0 else "before the first token,"
        told = f"{stands} reads {_listed(tokens)}"
        if not bool(weights[:, :, row].isfinite().all()):
            raise Broken(f"{stands} is not finite")
        if own < 0 and tokens and subject.dialect.hidden_row == "0":
            raise Broken(f"{told}, where it should read none")
        if own < 0:
            continue
        if tokens and tokens[-1] > own:
            raise Broken(f"{told}, some of which come after it")
        if not bool(read[:, row, own].all()) and subject.reads_itself(given, row):
            raise Broken(f"{told}, and not its own")
    return ""


def _value_of(given: Given, token: int) -> Given:
    def change(name: str, x: Tensor) -> Tensor:
        return (torch.arange(x.shape[2])[:, None] == token).expand_as(x).to(x) if name == "v" else x

    return given.mapped(change)


def _listed(tokens: list[int]) -> str:
    if not tokens:
        return "no token"
    return f"token{'s' if len(tokens) > 1 else ''} {', '.join(map(str, tokens))}"


def padding(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    assert given.key_mask is not None
    rows = subject.rows(given)
    if trial.padding in ("left", "right"):
        for sample in range(trial.batch_size):
            alone, real = given.without_padding(sample)
            compare(
                rows[sample : sample + 1][:, :, real],
                subject.rows(alone),
                subject.tolerance,
                f"sample {sample} beside its run without the padding",
            )
    other = subject.rows(_in_padding(given, 1000.0))
    _compare_real(given, other, rows, subject.tolerance, "when padded tokens change, a row")
    return ""


def packing(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    rows = subject.rows(given)
    for sample, tokens in given.pieces():
        one = slice(sample, sample + 1)
        alone = replace(given, segments=None).select(one, keys=tokens, queries=tokens)
        compare(
            rows[one][:, :, tokens],
            subject.rows(alone),
            subject.tolerance,
            f"the piece of tokens {int(tokens[0])} to {int(tokens[-1])} beside its run alone",
        )
    return ""


def hidden_rows(subject: Subject, trial: Trial) -> str:
    given = subject.given(replace(trial, dtype=subject.dtype))
    own, leaves = leaves_of(given)
    rows = subject.rows(own)
    if not bool(rows.isfinite().all()):
        raise Broken(f"{place(~rows.isfinite())} is not finite where nothing can be seen")
    found = _what_it_is(rows, given)
    if found != subject.dialect.hidden_row:
        raise Broken(
            f"a row that sees nothing is {found}, and not {subject.dialect.hidden_row} "
            f"(its largest number is {rows[0].abs().max():.3g})"
        )
    if rows.requires_grad:
        for name, x in gradients(rows, torch.ones_like(rows), leaves).items():
            if not bool(x.isfinite().all()):
                raise Broken(f"the gradient of {name} is not finite where nothing can be seen")
            if found == "0" and name in ("q", "k", "v") and x[0].abs().max() > 0:
                raise Broken(f"a sample that sees nothing sends a gradient to {name}")
    return ""


def nan_in_padding(subject: Subject, trial: Trial) -> str:
    _promised(subject)
    given = subject.given(replace(trial, dtype=subject.dtype))
    clean, other = subject.rows(given), subject.rows(_in_padding(given, NAN))
    _compare_real(given, other, clean, subject.tolerance, "with NaN in padded slots, a row")
    return ""


def nan_in_the_future(subject: Subject, trial: Trial) -> str:
    _promised(subject)
    given = subject.given(replace(trial, dtype=subject.dtype))
    token = max(1, trial.key_length * 2 // 3)
    if token >= trial.key_length:
        return ""
    other = subject.rows(given.changed(token, NAN, queries=False))
    compare(
        other[:, :, :token],
        subject.rows(given)[:, :, :token],
        subject.tolerance,
        f"with NaN in token {token}, an earlier row",
    )
    return ""


def _promised(subject: Subject) -> None:
    if not subject.dialect.isolates_nan:
        raise NotApplicable(f"{subject.dialect.name} does not promise it")


def _compare_real(
    given: Given, found: Tensor, expected: Tensor, tolerance: float, what: str
) -> None:
    """Compare the rows of tokens that are no padding."""
    assert given.key_mask is not None
    padded = ~given.key_mask[:, None, :, None]
    compare(found.masked_fill(padded, 0.0), expected.masked_fill(padded, 0.0), tolerance, what)


def _in_padding(given: Given, value: float) -> Given:
    assert given.key_mask is not None
    padded = ~given.key_mask[:, None, :, None]

    def change(name: str, x: Tensor) -> Tensor:
        return x.masked_fill(padded, value) if name in ("k", "v") else x

    return given.mapped(change)


def _what_it_is(rows: Tensor, given: Given) -> str:
    """What the rows of the first sample are, which see nothing."""
    if rows[0].abs().max() == 0:
        return "0"
    mean = given.v[0].mean(1).repeat_interleave(rows.shape[1] // given.v.shape[1], 0)
    near = torch.allclose(rows[0].detach(), mean[:, None].to(rows).expand_as(rows[0]), rtol=1e-3)
    return "mean of v" if near else "something else"


RULES = (
    Rule(
        "causality",
        "Changing a token changes no row before it, and no row sends it a gradient.",
        causality,
        (
            Trial(is_causal=True),
            Trial(19, 19, is_causal=True, seed=1),
            Trial(6, 13, is_causal=True),
        ),
        causal=True,
    ),
    Rule(
        "alignment",
        "The last query stands at the last key: a causal row reads its own token, and none after.",
        alignment,
        (
            Trial(is_causal=True),
            Trial(4, 7, is_causal=True),
            Trial(5, 3, is_causal=True),
        ),
        causal=True,
    ),
    Rule(
        "padding",
        "Rows equal those of the run without the padding, whatever stands in it.",
        padding,
        tuple(Trial(12, 12, padding=kind) for kind in ("left", "right", "inside")),
    ),
    Rule(
        "packing",
        "A packed row equals its pieces run apart.",
        packing,
        (Trial(12, 12, pieces=3), Trial(17, 17, pieces=2, seed=1)),
    ),
    Rule(
        "hidden rows",
        "A row that sees nothing is 0, and so is its gradient, or what its dialect says.",
        hidden_rows,
        (Trial(6, 6, padding="all"),),
    ),
    Rule(
        "NaN in padding",
        "What is no number in a padded slot reaches nothing.",
        nan_in_padding,
        tuple(Trial(12, 12, padding=kind) for kind in ("right", "left")),
    ),
    Rule(
        "NaN in the future",
        "What is no number in a token reaches no row before it.",
        nan_in_the_future,
        (Trial(12, 12, is_causal=True),),
        causal=True,
    ),
)
