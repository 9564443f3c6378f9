"""Dilated windows, one dilation for all heads or one for each: against the oracle, in cost, in a
process with some heads, and in decoding."""

from __future__ import annotations

import pytest
import torch
from cases import FEW_SITUATIONS, Case, Situation, ask_oracle, close, gradients_of, tensors

import attnzoo
from attnzoo.engines.sparse.patterns.window import Window

BY_HEAD = {"window": 5, "dilation": [1, 3, 1, 2]}
DIRECTION = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@DIRECTION
@pytest.mark.parametrize("situation", [one for one in FEW_SITUATIONS if one.heads == 4], ids=str)
def test_a_dilation_of_each_head(situation: Situation, is_causal: bool) -> None:
    """Heads 0 and 2 share a dilation and no key-value head."""
    case = Case("sliding_window", BY_HEAD)
    q, k, v, upstream = tensors(situation)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    masks = {"key_mask": situation.key_mask(), "is_causal": is_causal}
    expected, a = ask_oracle(case.build(), q, k, v, options=BY_HEAD, **masks)
    wanted = gradients_of(expected, upstream, *leaves)
    for backend in ("tiles", "windows", "reference"):
        attn = case.build(dtype=torch.float64, prefer=backend)
        out = attn(q, k, v, **masks)
        close(out, expected, 1e-10, f"output by {backend}")
        close(attn.weights(q, k, **masks), a, 1e-10, "A")
        found = gradients_of(out, upstream, *leaves)
        for name, one, other in zip("qkv", found, wanted, strict=True):
            close(one, other, 1e-10, f"gradient of {name} by {backend}")


@DIRECTION
@pytest.mark.parametrize("lengths", [(1, 1), (65, 65), (1, 65), (65, 17), (140, 257)], ids=str)
@pytest.mark.parametrize("dilation", [3, BY_HEAD["dilation"]], ids=str)
def test_support_is_counted(
    dilation: int | list[int], lengths: tuple[int, int], is_causal: bool
) -> None:
    attn = Case("sliding_window", {"window": 5, "dilation": dilation}).build()
    q, k, _, _ = (x.float() for x in tensors(Situation(*lengths)))
    seen = int((attn.weights(q, k, is_causal=is_causal) != 0).sum())
    cost = attn.cost(2, *lengths, kv_heads=2, is_causal=is_causal)
    assert cost.support_macs == 2 * 8 * seen
    assert cost.macs >= cost.support_macs


def test_decoding_keeps_what_a_dilated_window_reaches() -> None:
    attn = Case("sliding_window", BY_HEAD).build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(40, 40))
    whole, state = (
        attn(q, k, v, is_causal=True),
        attn.init_state(2, kv_heads=2, dtype=torch.float64),
    )
    for i in range(40):
        row, state = attn.step(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], state)
        close(row, whole[:, :, i : i + 1], 1e-10, f"row {i}")
    assert state.k.shape[2] == 13  # (5 - 1) · 3 + 1
    assert attn.cost(2, 40, kv_heads=2, is_causal=True).state_elements == state.elements()


def test_some_heads_keep_their_dilation() -> None:
    attn = Case("sliding_window", BY_HEAD).build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(65, 65, kv_heads=4))
    whole = attn(q, k, v)
    attn.keep_heads(1, 2)
    close(attn(q[:, 1:3], k[:, 1:3], v[:, 1:3]), whole[:, 1:3], 1e-12, "heads 1 and 2")


def test_bad_dilations() -> None:
    for dilation, message in (
        (0, "dilation=0"),
        ([1, 0, 1, 1], "dilation=0"),
        ([], r"dilation=\(\)"),
        ([1, 2], "gives 2 numbers for heads=4"),
    ):
        with pytest.raises(ValueError, match=message):
            attnzoo.build("sliding_window", heads=4, head_dim=8, dilation=dilation)
    with pytest.raises(ValueError, match="dilation=2 with sinks=0 has no equal in flash-attn"):
        Window(4, 2).to_flash_attention(is_causal=True)
    with pytest.raises(ValueError, match="dilation=2 with sinks=0 has no equal in Longformer"):
        Window(4, 2).to_longformer()
