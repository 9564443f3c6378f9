"""What is handed to flash-linear-attention, through a plain recurrence of its operator's
definition."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, Situation, close, gradients_of, padding, tensors
from torch import Tensor

from attnzoo.call import Call
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
