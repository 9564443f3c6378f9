"""Retention's three forms, each as the paper writes it, give the same rows; and how a head's decay
follows it."""

from __future__ import annotations

import pytest
import torch
from cases import close
from torch import Tensor

import attnzoo

LENGTH, HEADS, HEAD_DIM = 300, 4, 8


def inputs(kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, heads, LENGTH, HEAD_DIM, dtype=torch.float64, generator=generator)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    return q, k, v


def recurrent(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sun et al. 2023, equation 6: S_n = γ S_{n-1} + K_nᵀ V_n, out_n = Q_n S_n; and the last S."""
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(k.shape[1])], dtype=torch.float64)[
        :, None, None
    ]
    group = q.shape[1] // k.shape[1]
    state, rows = torch.zeros(2, k.shape[1], HEAD_DIM, HEAD_DIM, dtype=torch.float64), []
    for n in range(LENGTH):
        state = gamma * state + k[:, :, n, :, None] * v[:, :, n, None, :]
        rows.append(
            scale * torch.einsum("bhd,bhde->bhe", q[:, :, n], state.repeat_interleave(group, 1))
        )
    return torch.stack(rows, 2), state


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_parallel_chunked_and_recurrent_agree(kv_heads: int, scale: float | None) -> None:
    q, k, v = inputs(kv_heads)
    factor = HEAD_DIM**-0.5 if scale is None else scale
    wanted, last = recurrent(q, k, v, factor)
    for backend in ("reference", "chunked"):
        attn = attnzoo.build(
            "retention", heads=HEADS, head_dim=HEAD_DIM, scale=scale, backend=backend
        )
        close(attn(q, k, v, is_causal=True), wanted, 1e-12, f"the whole, {backend}")
        state = attn.init_state(2, kv_heads=kv_heads, dtype=torch.float64)
        rows = []
        for part in (slice(0, 1), slice(1, 140), slice(140, 141), slice(141, LENGTH)):
            out, state = attn.step(q[:, :, part], k[:, :, part], v[:, :, part], state)
            rows.append(out)
        close(torch.cat(rows, 2), wanted, 1e-12, f"in pieces, {backend}")
        # The engine's state holds √s·k; its last column is a sum that nobody reads.
        held = state.past.sums[..., :-1] * factor**0.5
        close(held, last * factor, 1e-12, f"the state, {backend}")


def test_a_key_is_worth_gamma_less_with_every_token() -> None:
    attn = attnzoo.build("retention", heads=HEADS, head_dim=HEAD_DIM, scale=1.0)
    ones = torch.ones(1, HEADS, 40, HEAD_DIM)
    ratios = attn.weights(ones, ones, is_causal=True)[0, :, -1]
    torch.testing.assert_close(
        ratios[:, :-1] / ratios[:, 1:],
        torch.tensor([[31 / 32], [63 / 64], [127 / 128], [255 / 256]]).expand(-1, 39),
    )


def test_what_has_faded_away_is_zero_and_so_is_its_gradient() -> None:
    """0.96875^20000 is below float32."""
    attn = attnzoo.build("retention", heads=1, head_dim=HEAD_DIM)
    q, k, v = (torch.randn(1, 1, 20_000, HEAD_DIM, requires_grad=True) for _ in range(3))
    attn(q, k, v, is_causal=True)[:, :, -1].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all()
    assert k.grad is not None and not k.grad[:, :, :1000].any() and bool(k.grad[:, :, -30:].any())
