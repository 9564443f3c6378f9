"""A rule: what it says, on which calls it is tried, and the function that judges one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.conformance.judged_callable import Subject
from attnzoo.conformance.trial_call import Trial

#: What a rule found to be true, in words, or as a number of which the largest is told; "" is
#: nothing.
Measured = str | float


class Broken(Exception):
    """The rule does not hold: why, in a sentence."""


@dataclass(frozen=True)
class Rule:
    """One rule.

    name: as reports and `rules=` have it
    says: what holds, in a sentence
    judge: tries one call. Raises `Broken`; may return what it measured
    trials: calls to try, in both directions where is_causal is not told
    causal: whether it is about causal calls alone
    shrinks: whether a smaller call that fails says more; not where the size is the point
    unit: of the numbers that `judge` measures
    """

    name: str
    says: str
    judge: Callable[[Subject, Trial], Measured]
    trials: tuple[Trial, ...]
    causal: bool = False
    shrinks: bool = True
    unit: str = ""


def compare(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise `Broken` where they differ by more than `tolerance` times the largest number of what is
    expected (1 at least), or where one alone is no number."""
    found, expected = found.detach().double(), expected.detach().double()
    if not found.numel():
        return
    if not bool(found.isfinite().all()):
        raise Broken(f"{what}: {place(~found.isfinite())} is not finite")
    error = (found - expected).abs()
    bound = tolerance * max(1.0, expected.abs().max().item())
    if error.max() > bound:
        worst = error.argmax()
        raise Broken(
            f"{what}: {place(error == error.max())} is {found.flatten()[worst]:.6g} where "
            f"{expected.flatten()[worst]:.6g} belongs, off by {error.max():.2g}"
        )


def place(where: Tensor) -> str:
    """Where the first True stands, of a tensor (batch, heads, length, width)."""
    index = where.nonzero()[0].tolist()
    if len(index) == 4:
        return f"sample {index[0]}, head {index[1]}, token {index[2]}, channel {index[3]}"
    return f"entry {tuple(index)}"


def gradients(out: Tensor, upstream: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; 0 where out does not depend on one. Raises `Broken` where autograd cannot
    come back."""
    if not out.requires_grad:
        raise Broken("the rows carry no gradient")
    try:
        found = torch.autograd.grad(
            out, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        raise Broken(f"the backward pass raised: {str(error).splitlines()[0]}") from None
    return dict(zip(leaves, found, strict=True))
