"""What is handed to flash-linear-attention, through a plain recurrence of its operator's
definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, Situation, close, gradients_of, padding, tensors
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import openly
from attnzoo.engines.linear import fla_kernel
from attnzoo.engines.linear.linear import Linear
from attnzoo.sequences.bad_slots import clear_padding

KERNELS = [case for name in ("linear", "performer") for case in CASES[name]]


def gated_recurrence(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None, scale: float
) -> tuple[Tensor, None]:
    """Simple gated linear attention, (batch, length, heads, ...): S_t = exp(g_t) S_{t-1} + k_t
    v_tᵀ, o_t = scale · q_t S_t."""
    state, rows = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        if g is not None:
            assert bool((g <= 0).all()), "a gate that grows the state"
            state = state * g[:, t].exp()[..., None, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append(scale * (q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(rows, 1), None


@pytest.mark.parametrize("case", KERNELS, ids=str)
@pytest.mark.parametrize("kind", ["none", "left", "interior", "whole"])
@pytest.mark.parametrize("size", [1.0, 8.0], ids=["unit", "large"])
def test_the_mathematics_is_ours(case: Case, kind: str, size: float) -> None:
    """Rows, gradients and empty rows, at key norms that overflow an unguarded exponential too."""
    attn = case.build()
    engine = attn.engine
    assert isinstance(engine, Linear)
    if engine.feature_map.normalizer == "feature":
        return
    q, k, v, upstream = (x.float() for x in tensors(Situation(40, 40), shift=case.shift))
    k = k * size
    inputs = [x.requires_grad_() for x in (q, k, v)]
    calls = [clear_padding(Call(q, k, v, padding(kind, 2, 40), None, True)) for _ in range(2)]
    out, (expected, _, _) = (
        fla_kernel.attend(engine.feature_map, calls[0], gated_recurrence),
        engine(calls[1], "reference"),
    )
    close(out, expected, 2e-5, "output")
    assert not out[expected.abs().sum(-1) == 0].any(), "an empty row is not 0"
    for name, found, wanted in zip(
        "qkv",
        gradients_of(out, upstream, *inputs),
        gradients_of(expected, upstream, *inputs),
        strict=True,
    ):
        close(found, wanted, 1e-4, f"gradient of {name}")


def on(
    device: str,
    dtype: torch.dtype,
    query_length: int = 6,
    key_length: int = 6,
    *,
    is_causal: bool = True,
) -> Call:
    k = torch.zeros(1, 1, key_length, 8, dtype=dtype, device=device)
    return Call(
        torch.zeros(1, 1, query_length, 8, dtype=dtype, device=device), k, k, None, None, is_causal
    )


def test_it_refuses_on_the_cpu() -> None:
    engine = Case("linear").build().engine
    assert ("CUDA device, got cpu") in str(fla_kernel.why_not(engine, on("cpu", torch.bfloat16)))  # pyright: ignore[reportArgumentType]


def test_auto_takes_it_for_whole_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding runs in chunks, and is said to."""
    first, *others = Linear.backends
    ready = replace(first, run=lambda _, call: call.q, why_not=lambda *_: None)
    monkeypatch.setattr(Linear, "backends", (ready, *others))
    attn = Case("linear").build(dtype=torch.bfloat16)
    q, k, v, _ = (x.bfloat16() for x in tensors(Situation(6, 6, kv_heads=4)))
    assert torch.equal(attn(q, k, v, is_causal=True), q) and attn.last_backend == "fla"
    attn(q.requires_grad_(), k, v, is_causal=True)
    assert attn.last_backend == "chunked"  # its backward pass has not run on a GPU
    q = q.detach()
    out, _ = attn.step(q, k, v, attn.init_state(2, kv_heads=k.shape[1]))
    assert attn.last_backend == "chunked"
    attn.backend = "chunked"
    close(out, attn(q, k, v, is_causal=True), 1e-6, "rows")


def test_it_is_kept_out_of_graphs_and_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, call = Case("linear").build().engine, on("meta", torch.bfloat16)
    assert isinstance(engine, Linear)
    monkeypatch.setattr(fla_kernel, "missing", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert fla_kernel.why_not(engine, call) is None
    with openly():
        assert "breaks graphs" in str(fla_kernel.why_not(engine, call))
