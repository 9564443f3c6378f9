"""Every variant by every backend on a GPU, against the reference in float64: `pytest -m cuda`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Case, Situation, can, gradients_of, tensors, usual_cases
from stages import only
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError

OPTIONS = {
    "bigbird": {"block_size": 32, "num_random_blocks": 1},
    "sliding_window": {"window": 100},
    "performer": {"num_features": 64},
}
"""Sizes that the kernels take, where the usual form is too small for them."""
SITUATIONS = [
    Situation(384, 384),
    Situation(333, 333, "interior"),
    Situation(333, 333, "whole", kv_heads=1),
    Situation(200, 333, "left"),
    Situation(333, 200),
    Situation(1, 333, kv_heads=4),
]
# Of the gradient's norm: about four units of the dtype, float32 more.
GRADIENT = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [
    Case(case.variant, OPTIONS.get(case.variant, case.options), case.shift)
    for case in usual_cases()
]
# Forms that flex takes too.
CASES += [
    Case("longformer", {"window": 100}),
    Case("sliding_window", {"window": 100, "dilation": 2}),
]


# Every class of shapes costs FlexAttention 5 to 30 seconds to compile: two classes, in two dtypes,
# or in one where a backward kernel is searched for.
COMPILED_SITUATIONS = [Situation(384, 384), Situation(333, 333, "interior", kv_heads=1)]


def combinations() -> list[Any]:
    """Every case with each of its backends, those for CUDA too, in every dtype."""
    return [
        pytest.param(case, backend, dtype, id=f"{dtype}-{case}-{backend}")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for case in CASES
        for backend in case.build().engine.backend_names()
        if backend != "reference" and not (backend == "flex" and dtype not in _compiled_in(case))
    ]


def _compiled_in(case: Case) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if case.variant == "bigbird" else (torch.bfloat16, torch.float32)


def difference(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def answer(
    case: Case,
    backend: str,
    situation: Situation,
    is_causal: bool,
    dtype: torch.dtype,
    inputs: list[Tensor],
    grad: Tensor,
) -> list[Tensor]:
    """The output and the gradients of q, k and v by one backend in one dtype."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    mask = situation.key_mask()
    attn = case.build(situation.heads, 64, dtype=dtype, backend=backend).to(q.device)
    out = attn(q, k, v, key_mask=None if mask is None else mask.to(q.device), is_causal=is_causal)
    assert attn.last_backend == backend
    return [out.detach(), *gradients_of(out, grad.to(dtype), q, k, v)]


def agree(
    case: Case, backend: str, dtype: torch.dtype, situation: Situation, is_causal: bool, device: str
) -> None:
    """The output errs at most twice as much as the reference in that dtype (rule 10), the gradients
    by GRADIENT; empty rows are 0."""
    q, k, v, upstream = (x.to(dtype).to(device) for x in tensors(situation, 64, shift=case.shift))
    found = answer(case, backend, situation, is_causal, dtype, [q, k, v], upstream)
    exact = answer(case, "reference", situation, is_causal, torch.float64, [q, k, v], upstream)
    reference = answer(case, "reference", situation, is_causal, dtype, [q, k, v], upstream)
    bound = max(2 * difference(reference[0], exact[0]), GRADIENT[dtype] / 4)
    assert difference(found[0], exact[0]) <= bound, (
        f"output: {difference(found[0], exact[0]):.3g} over {bound:.3g}"
    )
    assert not found[0][exact[0].abs().sum(-1) == 0].any(), "an empty row is not 0"
    for name, actual, expected in zip("qkv", found[1:], exact[1:], strict=True):
        assert torch.isfinite(actual).all(), f"gradient of {name} is not finite"
        assert difference(actual, expected) <= GRADIENT[dtype], (
            f"gradient of {name}: {difference(actual, expected):.3g} over {GRADIENT[dtype]}"
        )


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "backend", "dtype"), combinations())
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_agrees_with_the_reference(
    case: Case, backend: str, dtype: torch.dtype, is_causal: bool
) -> None:
    """In every situation that the backend takes; skipped with its reason where it takes none."""
    if not can(case.spec, is_causal):
        pytest.skip(f"{case.variant} cannot be {'causal' if is_causal else 'bidirectional'}")
    ran, refusal = 0, ""
    situations = COMPILED_SITUATIONS if backend == "flex" else SITUATIONS
    for situation in (one for one in situations if can(case.spec, is_causal, one)):
        try:
            agree(case, backend, dtype, situation, is_causal, "cuda")
        except UnsupportedError as error:
            refusal = str(error)
        else:
            ran += 1
    if not ran:
        pytest.skip(refusal)


CHANGED_SCORES = [
    Case("standard", {"softcap": 2.0}),
    Case("flash", {"softcap": 2.0}),
    Case("sliding_window", {"window": 100, "softcap": 2.0}),
    Case("longformer", {"window": 100, "global_tokens": 3, "softcap": 2.0}),
    Case("bigbird", {"block_size": 32, "num_random_blocks": 1, "softcap": 2.0}),
]


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case}-{backend}")
        for case in CHANGED_SCORES
        for backend in case.build().engine.backend_names()
        if backend != "reference"
    ],
)
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
def test_soft_capped_scores_with_a_bias_by_distance(
    case: Case, backend: str, learned: bool
) -> None:
    """In bfloat16 with a bias in float32, and its gradient where it is learned."""
    q, k, v, upstream = (x.bfloat16().cuda() for x in tensors(Situation(384, 384), 64))
    bias = torch.randn(4, 2 * 383 + 1, generator=torch.Generator().manual_seed(1)).cuda()

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        table = bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_(learned)
        attn = case.build(4, 64, dtype=dtype, backend=backend).cuda()
        out = attn(*leaves, is_causal=True, distance_bias=table)
        leaves += [table] if learned else []
        return [out.detach(), *gradients_of(out, upstream.to(dtype), *leaves)]

    exact = run("reference", torch.float64)
    try:
        found = run(backend, torch.bfloat16)
    except UnsupportedError as error:
        pytest.skip(str(error))
    for name, actual, expected in zip(["output", *"qkv", "bias"], found, exact, strict=False):
        bound = GRADIENT[torch.bfloat16] / (4 if name == "output" else 1)
        assert difference(actual, expected) <= bound, (name, difference(actual, expected))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["standard", "sliding_window", "linear"])
@pytest.mark.parametrize("learns", [False, True], ids=["forward", "backward"])
def test_a_bad_token_reaches_no_earlier_row(name: str, learns: bool) -> None:
    """By the backend that auto takes. Rows are equal bit for bit; kernels add up gradients in any
    order."""
    attn = attnzoo.build(name, heads=4, head_dim=64).cuda()
    clean = [x.bfloat16().cuda() for x in tensors(Situation(700, 700), 64)[:3]]
    found = []
    for bad in (0.0, math.nan, math.inf):
        q, k, v = (x.clone() for x in clean)
        k[:, :, 600, 3], v[:, :, 600, 5] = bad, bad
        inputs = [x.requires_grad_(learns) for x in (q, k, v)]
        out = attn(*inputs, is_causal=True)
        rows = out[:, :, :600]
        gradients = torch.autograd.grad(rows.float().sum(), inputs) if learns else ()
        found.append([rows.detach(), *(x[:, :, :600] for x in gradients)])
        assert out[:, :, 600:].isnan().all().item() == (bad != 0)
    for rows, *gradients in found[1:]:
        assert torch.equal(rows, found[0][0])
        for x, y in zip(gradients, found[0][1:], strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [CASES[-1], Case("bigbird", {"block_size": 128})], ids=str)
def test_a_second_backward_pass_is_possible(case: Case) -> None:
    """With retain_graph, by FlexAttention."""
    attn = case.build(4, 64, dtype=torch.bfloat16, backend="flex").cuda()
    q, k, v = (x.bfloat16().cuda().requires_grad_() for x in tensors(Situation(512, 512), 64)[:3])
    out = attn(q, k, v, is_causal=True).float().sum()
    first = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(out, (q, k, v)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=GRADIENT[torch.bfloat16])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["standard", "sliding_window", "linear"])
def test_a_captured_call_answers_for_other_values(name: str) -> None:
    """As a CUDA graph, which holds no decision that was made by values."""
    attn = attnzoo.build(name, heads=4, head_dim=64).cuda()
    inputs = [x.bfloat16().cuda() for x in tensors(Situation(512, 512), 64)[:3]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            attn(*inputs, is_causal=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attn(*inputs, is_causal=True)
        for x in inputs:
            x.copy_(torch.randn_like(x))
        inputs[2][:, :, 300] = math.nan
        graph.replay()
        torch.testing.assert_close(out, attn(*inputs, is_causal=True), equal_nan=True)
    assert out[:, :, :300].isfinite().all() and out[:, :, 300:].isnan().all()


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_equals_the_causal_rows(case: Case) -> None:
    if not case.spec.decodes:
        pytest.skip(f"{case.variant} does not decode")
    q, k, v, _ = (x.bfloat16().cuda() for x in tensors(Situation(300, 300), 64, shift=case.shift))
    attn = case.build(4, 64, dtype=torch.bfloat16).cuda()
    state = attn.init_state(2, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    rows = []
    for part in (slice(0, 200), *(slice(t, t + 1) for t in range(200, 300))):
        out, state = attn.step(q[:, :, part], k[:, :, part], v[:, :, part], state)
        rows.append(out)
    exact = case.build(4, 64, dtype=torch.float64, backend="reference").cuda()(
        q.double(), k.double(), v.double(), is_causal=True
    )
    assert difference(torch.cat(rows, 2), exact) <= GRADIENT[torch.bfloat16] / 4


def test_no_backend_is_left_out() -> None:
    """Every backend that any variant has is asked for on a GPU."""
    asked = {one.values[1] for one in combinations()}
    engines = (Case(name).build().engine for name in attnzoo.names())
    named = {name for engine in engines for name in engine.backend_names()} - {"reference"}
    assert asked == named and asked >= {"xformers", "varlen", "flex", "fla"}


@pytest.mark.parametrize("case", only(CASES[::4], CASES))
def test_the_comparison_can_be_made(case: Case) -> None:
    """The comparison of this file holds for the reference itself in float32, on the CPU, and tells
    a wrong answer."""
    is_causal = case.spec.causal
    possible = [situation for situation in SITUATIONS if can(case.spec, is_causal, situation)]
    agree(
        case,
        "reference",
        torch.float32,
        max(possible, key=lambda situation: situation.padding == "left"),
        is_causal,
        "cpu",
    )
    situation = possible[0]
    q, k, v, upstream = tensors(situation, 64, shift=case.shift)
    wrong = answer(
        case, "reference", situation, is_causal, torch.float64, [q, k, v.roll(1, 2)], upstream
    )
    right = answer(case, "reference", situation, is_causal, torch.float64, [q, k, v], upstream)
    assert difference(wrong[0], right[0]) > GRADIENT[torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["xformers", "varlen", "flex", "fla"])
def test_refused_on_the_cpu(case: Case, backend: str) -> None:
    """Asked for by name, a backend for CUDA says that it is one."""
    if backend not in case.build().engine.backend_names():
        with pytest.raises(ValueError, match=f"backend='{backend}' is unknown"):
            case.build(backend=backend)
        return
    attn = case.build(backend=backend)
    q, k, v, _ = (x.float() for x in tensors(Situation(6, 6)))
    # FlexAttention runs on a CPU, too, where nothing trains.
    given = q.requires_grad_() if backend == "flex" else q
    reason = "no backward pass on a CPU" if backend == "flex" else "CUDA device, got cpu"
    with pytest.raises(
        UnsupportedError, match=f"{backend}.* refuses .* {reason}.*use backend='auto'"
    ):
        attn(given, k, v, is_causal=attn.spec.causal)
    attn.backend = "auto"
    attn(q, k, v, is_causal=attn.spec.causal)
    assert attn.last_backend in ("sdpa", "dense", "tiles", "short", "chunked", "open")


def test_fla_does_not_decode() -> None:
    attn = attnzoo.build("linear", heads=1, head_dim=8, backend="fla")
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(UnsupportedError, match=r"'fla' does not decode.*'auto'"):
        attn.step(x, x, x, attn.init_state(1))
