"""Derivatives beyond one backward pass: again, in batches, forward, and in a trace; every variant
says what its reference says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Situation, close, tensors, usual_cases
from small import of_each_family
from stages import only, staged
from torch import Tensor, nn

from attnzoo import Attention

MORE = [
    Case("linear", {"feature_map": "softmax"}),
    Case("sliding_window", {"window": 7, "sinks": 3}),
    Case("sliding_window", {"window": 5, "dilation": [3, 1, 1, 3], "sink_logits": True}),
    Case("sparse_transformer", {"stride": 5, "factors": "by_head"}),
]
RUNS = [
    staged(case, is_causal, kind, first=(way + number + place) % (2 * len(case.spec.forms)) == 0)
    for place, case in enumerate([*usual_cases(), *MORE])
    for way, is_causal in enumerate(case.spec.forms)
    for number, kind in enumerate(("none", "whole"))
]
FEW = [case for case in usual_cases() if case.variant in of_each_family()]
EVERYWHERE = pytest.mark.parametrize(("case", "is_causal", "kind"), RUNS)
LENGTH = 70


class Run:
    """One call of a case by its fast backend and by its reference, of the same numbers. kind: of
    padding."""

    def __init__(self, case: Case, is_causal: bool, kind: str) -> None:
        self.situation = Situation(LENGTH, LENGTH, kind)
        self.q, self.k, self.v, self.upstream = tensors(self.situation, shift=case.shift)
        self.masks = {"key_mask": self.situation.key_mask(), "is_causal": is_causal}
        self.fast, self.reference = (
            case.build(dtype=torch.float64, backend=backend) for backend in ("auto", "reference")
        )

    def of(self, attn: Attention) -> tuple[Tensor, list[Tensor]]:
        """The output and what it depends on."""
        leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        return attn(*leaves, **self.masks), [*leaves, *attn.parameters()]


def second_derivatives(out: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Of a function of the gradients that is not linear in them."""
    found = torch.autograd.grad(out, leaves, upstream, create_graph=True)
    return list(torch.autograd.grad(sum((x.cos() * x).sum() for x in found), leaves))  # pyright: ignore[reportArgumentType, reportCallIssue]


def agree(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        close(one, other, 1e-9, f"{what} {place}")


@EVERYWHERE
def test_a_backward_pass_is_differentiated_again(case: Case, is_causal: bool, kind: str) -> None:
    run = Run(case, is_causal, kind)
    found, expected = (
        second_derivatives(*run.of(attn), run.upstream) for attn in (run.fast, run.reference)
    )
    agree(found, expected, "second derivative")


@EVERYWHERE
def test_gradients_come_in_batches(case: Case, is_causal: bool, kind: str) -> None:
    run = Run(case, is_causal, kind)
    upstreams = torch.stack([run.upstream, run.upstream.flip(2), 3 * run.upstream])
    out, leaves = run.of(run.fast)
    one_by_one = [
        torch.autograd.grad(out, leaves, upstream, retain_graph=True) for upstream in upstreams
    ]
    found = torch.autograd.grad(out, leaves, upstreams, is_grads_batched=True)
    agree(
        list(found), [torch.stack(of_leaf) for of_leaf in zip(*one_by_one, strict=True)], "gradient"
    )


@pytest.mark.parametrize(
    "related",
    [lambda x: (x, x, x), lambda x: (x, 2 * x, x.flip(2))],
    ids=["one tensor", "functions of it"],
)
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_queries_and_keys_that_are_related_count_once(
    case: Case, related: Callable[[Tensor], Any]
) -> None:
    run = Run(case, case.spec.forms[0], "none")

    def second(attn: Attention) -> Tensor:
        x = run.q.clone().requires_grad_()
        return second_derivatives(attn(*related(2 * x), **run.masks), [x], run.upstream)[0]

    close(second(run.fast), second(run.reference), 1e-9, "second derivative")


@pytest.mark.parametrize("case", only(FEW, usual_cases()))
def test_forward_mode_and_nested_gradients(case: Case) -> None:
    run = Run(case, case.spec.forms[-1], "none")
    direction = run.q.flip(2)

    def derivatives(attn: Attention) -> list[Tensor]:
        def out(q: Tensor) -> Tensor:
            return attn(q, run.k, run.v, **run.masks)

        slope = torch.func.grad(lambda q: (out(q) * run.upstream).sum())
        forward = torch.func.jvp(out, (run.q,), (direction,))[1]
        both = torch.func.jvp(slope, (run.q,), (direction,))[1]
        again = torch.func.grad(lambda q: (slope(q) * direction).sum())(run.q)
        return [forward, both, again]

    agree(derivatives(run.fast), derivatives(run.reference), "derivative")


class Fixed(nn.Module):
    """What jit.trace takes: a module of tensors."""

    def __init__(self, attn: Attention, is_causal: bool) -> None:
        super().__init__()
        self.attn, self.is_causal = attn, is_causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.attn(q, k, v, key_mask=key_mask, is_causal=self.is_causal)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:DeprecationWarning"
)
@EVERYWHERE
def test_a_trace_with_gradients_on_serves_other_batches_and_masks(
    case: Case, is_causal: bool, kind: str
) -> None:
    run, other = (
        Run(case, is_causal, kind),
        Situation(LENGTH, LENGTH, "left" if kind == "whole" else "none", batch=3),
    )
    module, given = Fixed(run.fast, is_causal), run.situation.key_mask()
    inputs = tuple(x.requires_grad_() for x in (run.q, run.k, run.v))
    inputs = inputs if given is None else (*inputs, given)
    traced: Any = torch.jit.trace(module, inputs, check_trace=False)  # what follows checks it
    *more, upstream = tensors(other, shift=case.shift, seed=3)
    mask = other.key_mask()
    results = []
    for call in (traced, module):
        leaves = [x.clone().requires_grad_() for x in more]
        out = call(*leaves) if mask is None else call(*leaves, mask)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    agree(results[0], results[1], "result")


@pytest.mark.parametrize("case", only(FEW, usual_cases()))
def test_fvcore_counts_with_gradients_on(case: Case) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore: pip install 'attnzoo[cost]'")
    for is_causal in case.spec.forms:
        run = Run(case, is_causal, "none")
        inputs = tuple(x.requires_grad_() for x in (run.q, run.k, run.v))
        analysis = (
            fvcore.FlopCountAnalysis(Fixed(run.fast, is_causal), inputs)
            .unsupported_ops_warnings(False)
            .tracer_warnings("none")
        )
        analysis.total()
