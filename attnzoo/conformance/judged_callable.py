"""The callable that is judged, and what it is judged by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.conformance.trial_call import Given, Trial
from attnzoo.conventions.dialects.dialect import Dialect, NotExpressible
from attnzoo.oracles import ORACLES
from attnzoo.registry import Choice, options_of, spec_of
from attnzoo.spec import Spec

#: Float64 carries 2e-16; sums of a thousand terms and quotients by small sums lose four digits.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 64 * 2**-24}
SEEN = 1e-3  # least weight of a token that a row must be seen to read
MAX_LENGTH = 4096  # of variants that need to know one


class Refused(Exception):
    """The callable raised an error instead of answering."""


class NotApplicable(Exception):
    """The rule says nothing of this callable."""


@dataclass(frozen=True)
class Subject:
    """A callable, how it is called, and what it should be.

    function: the callable
    dialect: how it is called
    like: the variant that it should equal; None: only what every attention holds to is asked
    heads, head_dim: where it takes no other; None: any
    device: where its tensors are
    """

    function: Callable[..., Any]
    dialect: Dialect
    like: Choice | None = None
    heads: int | None = None
    head_dim: int | None = None
    device: str = "cpu"

    @property
    def spec(self) -> Spec | None:
        return None if self.like is None else spec_of(self.like.name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The most precise dtype that it takes and computes in."""
        for is_causal in self.forms:
            given = self.given(self.fitting(Trial(is_causal=is_causal)))
            try:
                return torch.float64 if self._computes_in_float64(given) else torch.float32
            except (Refused, NotApplicable):
                continue
        return torch.float32

    def _computes_in_float64(self, given: Given) -> bool:
        """Whether rows answer to changes of q that are lost in float32, each twice as much to twice
        as large ones. Rows that do not change at all are taken for float32."""
        rows = self.rows(given)
        turned = given.q.roll(1, -1)  # since many rows do not change with the length of q
        once, twice = (
            self.rows(replace(given, q=given.q + change * turned)) - rows for change in (1e-9, 2e-9)
        )
        size, bent = once.norm().item(), (twice - 2 * once).norm().item()
        return rows.dtype == torch.float64 and size > 0 and bent <= 0.1 * size

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    @property
    def forms(self) -> tuple[bool, ...]:
        """The values of is_causal to ask for."""
        return (False, True) if self.spec is None else self.spec.forms

    def fitting(self, trial: Trial) -> Trial:
        """The trial with heads and widths that the callable takes."""
        if self.dialect.sizes is not None:
            heads, kv_heads, head_dim = self.dialect.sizes(self.function)
            return replace(trial, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        trial = replace(trial, head_dim=self.head_dim or trial.head_dim)
        if self.heads is None:
            return trial
        kv_heads = self.heads if trial.kv_heads == trial.heads else trial.kv_heads
        kv_heads = kv_heads if self.heads % kv_heads == 0 else 1
        return replace(trial, heads=self.heads, kv_heads=kv_heads)

    def given(self, trial: Trial) -> Given:
        return Given.of(trial, self.spec)

    def rows(self, given: Given) -> Tensor:
        """What the callable answers, (batch, heads, query_length, head_dim) on the CPU.

        Raises `Refused` when it raises anything, and `NotApplicable` when its dialect has no words
        for such a call.
        """
        expected = (*given.q.shape[:3], given.v.shape[3])
        return self._answer(self.dialect.call, given, "rows", expected)

    def final_state(self, given: Given, sizes: tuple[int, ...]) -> Tensor:
        """The state after the last token that the callable answers, of these sizes, on the CPU;
        raises as `rows` does."""
        if self.dialect.final_state is None:
            raise NotApplicable(f"{self.dialect.name} has no word for a final state")
        return self._answer(self.dialect.final_state, given, "a state", sizes)

    def _answer(self, call: Any, given: Given, what: str, sizes: tuple[int, ...]) -> Tensor:
        found = asked(call, self.function, given.on(self.device))
        if not isinstance(found, Tensor) or tuple(found.shape) != sizes:
            told = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Refused(f"it returned {told} where {what} of {sizes} belong")
        return found.cpu()

    def expected(self, given: Given) -> Tensor:
        """The rows of the oracle, in float64 and with gradients. Raises `NotApplicable` where
        nothing says what the callable should be."""
        return self._oracle(given)[0]

    def reads_itself(self, given: Given, row: int) -> bool:
        """Whether A of the oracle has a weight, in every head, where query `row` stands; without an
        oracle, that it has."""
        if self.like is None:
            return True
        own = given.k.shape[2] - given.q.shape[2] + row
        return bool((self._oracle(given)[1][:, :, row, own].abs() > SEEN).all())

    def expected_state(self, given: Given) -> Tensor:
        """The final state of the oracle. Raises `NotApplicable` where there is none."""
        try:
            return self._oracle(given, output_final_state=True)[2]
        except ValueError as error:
            raise NotApplicable(str(error)) from None

    def _oracle(self, given: Given, **told: Any) -> tuple[Tensor, ...]:
        if self.like is None:
            raise NotApplicable("nothing says which attention it should be (like=)")
        double = given.mapped(lambda _, x: x.double())
        attn = self._built(given.q.shape[1], given.q.shape[3]).double()
        arguments = attn.oracle_arguments(given.q.shape[2], given.k.shape[2], given.is_causal)
        oracle = ORACLES[self.like.name]
        # An option of an input's name says whether one is learned.
        wanted = set(inspect.signature(oracle).parameters) - {one.name for one in attn.spec.inputs}
        options = {one.name: one.default for one in options_of(self.like.name)}
        options |= self.like.completed(max_length=MAX_LENGTH).options
        return oracle(
            double.q,
            double.k,
            double.v,
            **{name: value for name, value in options.items() if name in wanted},
            **arguments,
            **masks(double),
            **double.inputs,
            **told,
        )

    def leaves_out(self, given: Given) -> bool:
        """Whether the variant leaves keys out of some row, beside those that masks hide, or is none
        that does."""
        attn = self._built(given.q.shape[1], given.q.shape[3]).to(given.q.dtype)
        if attn.spec.family != "sparse":
            return True
        told: dict[str, Any] = {**masks(given), **given.inputs}
        weights = attn.weights(given.q, given.k, **told)
        seen = int((weights != 0).sum(-1).amax(-1).max())
        return seen < given.k.shape[2]

    def reference(self, given: Given) -> Tensor:
        """The rows of this library's reference in the dtype of the call."""
        if self.like is None:
            raise NotApplicable("nothing says which attention it should be (like=)")
        attn = self._built(given.q.shape[1], given.q.shape[3], backend="reference")
        attn = attn.to(given.q.dtype)
        return attn(given.q, given.k, given.v, **masks(given), **given.inputs).detach()

    def _built(self, heads: int, head_dim: int, **more: Any) -> Attention:
        assert self.like is not None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.like.completed(**more).build(heads, head_dim, max_length=MAX_LENGTH)


def asked(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a stranger's code answers. Raises `Refused` when it raises anything, and `NotApplicable`
    when a dialect has no words for the call."""
    try:
        return call(*arguments, **named)
    except NotExpressible as error:
        raise NotApplicable(str(error)) from None
    except Exception as error:  # whatever it raises
        raise Refused(_first_line(error)) from error


def masks(given: Given) -> dict[str, Any]:
    """The masks that a call has, by this library's names."""
    found = {"key_mask": given.key_mask, "segments": given.segments}
    return {
        "is_causal": given.is_causal,
        **{name: x for name, x in found.items() if x is not None},
    }


def _first_line(error: Exception) -> str:
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
