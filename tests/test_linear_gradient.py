"""The linear engine's own backward pass: the same numbers as autograd's through its chunks, and
what it leaves to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, Situation, cases, close, gradients_of, tensors
from stages import in_turn
from torch import Tensor

import attnzoo
from attnzoo.call import Call
from attnzoo.engines.linear import bidirectional, gradient
from attnzoo.engines.linear.causal import chunks
from attnzoo.engines.linear.feature_maps import EXPONENT, UNSCALED, SoftmaxFeatures
from attnzoo.registry import sized


def has_vjp(case: Case) -> bool:
    engine: Any = case.build().engine
    return hasattr(engine, "feature_map") and engine.feature_map.has_vjp


KNOWN = [case for case in cases() if case.spec.family == "kernel" and has_vjp(case)]
FORMS = [(case, form) for case in KNOWN for form in case.spec.forms]
KINDS = pytest.mark.parametrize(
    ("case", "is_causal"),
    [pytest.param(*one, id=f"{one[0]}-{'causal' if one[1] else 'all'}") for one in FORMS],
)
SITUATIONS = [
    Situation(1100, 1100, "interior"),
    Situation(1100, 1100, batch=1, heads=2, kv_heads=1),
    Situation(400, 1100, "left", heads=2, kv_heads=1),
    Situation(900, 300, batch=1, heads=2),
]


@pytest.mark.parametrize(("case", "is_causal", "whole_heads"), in_turn(FORMS, [True, False]))
def test_own_backward_is_autograds(
    case: Case, is_causal: bool, whole_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several chunks and several spans of them, or several heads."""
    monkeypatch.setattr(chunks, "HELD", 2 * (2 * 4 * 64 * 256))  # two chunks side by side
    monkeypatch.setattr(bidirectional, "IN_CACHE", 2**30 if whole_heads else 0)
    for situation in SITUATIONS:
        attn = case.build(situation.heads, dtype=torch.float64, **sized(case.variant, 1100))
        *inputs, upstream = tensors(situation, shift=case.shift)
        inputs = [x.requires_grad_() for x in inputs]
        mask = situation.key_mask()
        out = attn(*inputs, key_mask=mask, is_causal=is_causal)
        found = gradients_of(out, upstream, *inputs)
        with monkeypatch.context() as patch:
            patch.setattr(gradient, "why_not", lambda *_: "not here")
            traced = attn(*inputs, key_mask=mask, is_causal=is_causal)
        close(out.detach(), traced.detach(), 1e-11, "output")
        for name, own, wanted in zip(
            "qkv", found, gradients_of(traced, upstream, *inputs), strict=True
        ):
            close(own, wanted, 1e-11, f"gradient of {name}")


@KINDS
def test_differentiates_twice(case: Case, is_causal: bool) -> None:
    attn = case.build(2, 4, dtype=torch.float64)
    inputs = [
        x.requires_grad_()
        for x in tensors(Situation(5, 5, heads=2, kv_heads=1), 4, shift=case.shift)[:3]
    ]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: attn(q, k, v, is_causal=is_causal), inputs, fast_mode=True
    )


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    attn = Case("linear").build(dtype=torch.float64)
    q, k, v, upstream = tensors(Situation(300, 300))
    wanted = gradients_of(attn(*(x.requires_grad_() for x in (q, k, v))), upstream, q, k, v)
    for place, x in enumerate((q, k, v)):
        inputs = [y if y is x else y.detach() for y in (q, k, v)]
        (found,) = torch.autograd.grad(attn(*inputs), x, upstream)
        assert torch.equal(found, wanted[place])
        (again,) = torch.autograd.grad(attn(*inputs), x, upstream, create_graph=True)
        close(again.detach(), found, 1e-11, "gradient to be differentiated again")


def test_a_redraw_before_the_backward_pass_is_noticed() -> None:
    attn = Case("performer").build()
    q, k, v, upstream = (x.float() for x in tensors(Situation(20, 20)))
    out = attn(q.requires_grad_(), k, v)
    attn.redraw(1)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(upstream)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", ["linear", "performer"])
def test_autocast_changes_nothing(name: str, is_causal: bool) -> None:
    """Sums stay in float32 (rule 10), whether the backward pass runs inside of autocast or
    outside."""
    attn = Case(name).build()
    q, k, v, upstream = (x.bfloat16() for x in tensors(Situation(300, 300)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = attn(*inputs, is_causal=is_causal)
    wanted = gradients_of(expected, upstream, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attn(*inputs, is_causal=is_causal)
        inside = gradients_of(out, upstream, *inputs)
        out = attn(*inputs, is_causal=is_causal)
    assert torch.equal(out, expected)
    for found in (inside, gradients_of(out, upstream, *inputs)):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_forward_mode_and_functorch_see_into_the_chunks(name: str) -> None:
    attn = Case(name).build(dtype=torch.float64)
    q, k, v, upstream = tensors(Situation(20, 20))

    def run(q: Tensor) -> Tensor:
        return attn(q, k, v)

    directional = (torch.autograd.grad(run(q.requires_grad_()), q, upstream)[0] * upstream).sum()
    q = q.detach()
    close(
        torch.func.grad(lambda q: (run(q) * upstream).sum())(q).mul(upstream).sum(),
        directional,
        1e-11,
        "grad",
    )
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            run(torch.autograd.forward_ad.make_dual(q.requires_grad_(), upstream))
        ).tangent
        assert tangent is not None
        close((tangent * upstream).sum().detach(), directional, 1e-11, "forward mode")
    close(torch.func.vmap(run)(torch.stack([q, q]))[1].detach(), run(q).detach(), 1e-11, "vmap")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("largest", [EXPONENT, -EXPONENT, 1.01 * EXPONENT, -1.01 * EXPONENT, 60.0])
@pytest.mark.parametrize("tokens", [slice(70, 71), slice(None)])
def test_softmax_features_of_keys_in_range_and_out_of_it(
    tokens: slice, largest: float, is_causal: bool
) -> None:
    """Keys within the range of the exponential are taken as they are, others under a running
    maximum; float32 holds both."""
    attn = attnzoo.build("linear", heads=2, head_dim=8, feature_map="softmax")
    reference = attnzoo.build(
        "linear", heads=2, head_dim=8, feature_map="softmax", backend="reference"
    )
    q, k, v = (torch.randn(1, 2, 150, 8) for _ in range(3))
    k[:, 1, tokens, 3] = largest
    assert (SoftmaxFeatures().for_keys(k) is UNSCALED) == (abs(largest) <= EXPONENT)
    inputs, exact = (
        [x.requires_grad_() for x in (q, k, v)],
        [x.detach().double().requires_grad_() for x in (q, k, v)],
    )
    out, wanted = attn(*inputs, is_causal=is_causal), reference(*exact, is_causal=is_causal)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    for found, own in zip(
        torch.autograd.grad(out.sum(), inputs),
        torch.autograd.grad(wanted.sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), own, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_each_slab_has_a_log_scale_only_where_its_sums_need_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bidirectional, "slab_sizes", lambda *_: (1, 1, 150))
    q, k, v = (torch.randn(1, 4, 150, 8) for _ in range(3))
    k[:, 1, :, 3], k[:, 2, :, 5], k[:, 3, 7, 5] = 100.0, -200.0, -200.0
    _, _, pasts = bidirectional.forward(SoftmaxFeatures(), Call(q, k, v))
    assert [past.log_scale is not None for past in pasts] == [False, True, True, False]


@pytest.mark.parametrize("case", [case for case in KNOWN if False in case.spec.forms], ids=str)
def test_another_number_of_threads_in_the_backward_pass(case: Case) -> None:
    """What was taken together in the forward pass is taken together again; threads decide only
    there."""
    attn, before = (
        case.build(dtype=torch.float64, **sized(case.variant, 1100)),
        torch.get_num_threads(),
    )
    *inputs, upstream = tensors(Situation(1100, 1100), shift=case.shift)
    inputs, found = [x.requires_grad_() for x in inputs], []
    try:
        for threads in (1, 3):
            torch.set_num_threads(1)
            out = attn(*inputs)
            torch.set_num_threads(threads)
            found.append(gradients_of(out, upstream, *inputs))
    finally:
        torch.set_num_threads(before)
    for name, one, other in zip("qkv", *found, strict=True):
        close(other, one, 1e-11, f"gradient of {name}")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("as_module", [False, True])
def test_a_learned_map_is_asked_for_its_width_with_the_keys_own_size_and_dtype(
    is_causal: bool, dtype: torch.dtype, as_module: bool
) -> None:
    """value_dim differs from head_dim, and the map takes its own dtype alone."""
    layer = torch.nn.Linear(8, 20).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    feature_map = (
        torch.nn.Sequential(layer, torch.nn.ReLU()) if as_module else lambda x: layer(x).relu()
    )
    attn = attnzoo.build("linear", heads=2, head_dim=8, feature_map=feature_map)
    reference = attnzoo.build(
        "linear", heads=2, head_dim=8, feature_map=feature_map, backend="reference"
    )
    q, k, v = (torch.rand(2, 2, 130, size).to(dtype) for size in (8, 8, 12))
    with torch.no_grad():
        found, expected = (
            attention(q, k, v, is_causal=is_causal) for attention in (attn, reference)
        )
    close(found, expected, 1e-12 if dtype == torch.float64 else 1e-2, "rows")
    x = v.clone().requires_grad_()
    attn(q, k, x, is_causal=is_causal).float().sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())
    assert attn.cost(2, 130, is_causal=is_causal).state_elements == 2 * 2 * 20 * 9


def test_a_width_that_cannot_be_asked_for_yet_says_what_to_do() -> None:
    layer = torch.nn.Linear(8, 20).double()
    attn = attnzoo.build("linear", heads=2, head_dim=8, feature_map=lambda x: layer(x).relu())
    with pytest.raises(ValueError, match="call the attention once"):
        attn.cost(2, 130)
