"""Every variant by every backend on a GPU, against the reference in float64: `pytest -m cuda`.

Written where there was no GPU: these tests have not run on one, and their bounds have not met a
kernel yet.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, Situation, backends_of, can, gradients_of, tensors, usual_cases
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError

OPTIONS = {"bigbird": {}, "sliding_window": {"window": 100}, "performer": {"num_features": 64}}
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
@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for c in CASES for b in backends_of(c) if b != "reference"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_agrees_with_the_reference(
    case: Case, backend: str, dtype: torch.dtype, is_causal: bool
) -> None:
    """In every situation that the backend takes; skipped with its reason where it takes none."""
    if not can(case.spec, is_causal):
        pytest.skip(f"{case.variant} cannot be {'causal' if is_causal else 'bidirectional'}")
    ran, refusal = 0, ""
    for situation in (
        situation for situation in SITUATIONS if can(case.spec, is_causal, situation)
    ):
        try:
            agree(case, backend, dtype, situation, is_causal, "cuda")
        except UnsupportedError as error:
            refusal = str(error)
        else:
            ran += 1
    if not ran:
        pytest.skip(refusal)


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


@pytest.mark.parametrize("case", CASES, ids=str)
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
@pytest.mark.parametrize("backend", ["xformers", "flex", "fla"])
def test_refused_on_the_cpu(case: Case, backend: str) -> None:
    """Asked for by name, a backend for CUDA says that it is one."""
    if backend not in case.build().engine.backend_names():
        with pytest.raises(ValueError, match=f"backend='{backend}' is unknown"):
            case.build(backend=backend)
        return
    attn = case.build(backend=backend)
    q, k, v, _ = (x.float() for x in tensors(Situation(6, 6)))
    with pytest.raises(
        UnsupportedError,
        match=f"{backend}.* refuses .* CUDA device, got cpu.*use backend='auto'",
    ):
        attn(q, k, v, is_causal=attn.spec.causal)
    attn.backend = "auto"
    attn(q, k, v, is_causal=attn.spec.causal)
    assert attn.last_backend in ("sdpa", "dense", "tiles", "chunked", "open")


def test_fla_does_not_decode() -> None:
    attn = attnzoo.build("linear", heads=1, head_dim=8, backend="fla")
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(UnsupportedError, match=r"'fla' does not decode.*'auto'"):
        attn.step(x, x, x, attn.init_state(1))
