"""The mask that xformers is given, laid out by xformers itself, against ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import causal_mask
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.softmax.xformers_kernel import _no_operator, choose_bias, why_not


def call_of(query_length: int, key_length: int, *, is_causal: bool) -> Call:
    q, k = torch.zeros(1, 1, query_length, 8), torch.zeros(1, 1, key_length, 8)
    return Call(q, k, k, None, None, is_causal)


@pytest.mark.parametrize(
    ("query_length", "key_length"), [(1, 1), (1, 9), (9, 9), (3, 9), (130, 257)]
)
def test_the_chosen_bias_is_our_mask(query_length: int, key_length: int) -> None:
    pytest.importorskip("xformers")
    assert choose_bias(call_of(query_length, key_length, is_causal=False)) is None
    bias = choose_bias(call_of(query_length, key_length, is_causal=True))
    expected = causal_mask(query_length, key_length)
    if bias is None:
        assert expected.all()
    else:
        assert torch.equal(bias.materialize((query_length, key_length)) == 0, expected)


def test_it_refuses_on_the_cpu() -> None:
    assert "CUDA device, got cpu" in str(why_not(Softmax(), call_of(3, 3, is_causal=False)))


REFUSAL = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(8, 1024, 16, 64) (torch.bfloat16)
     p           : 0.0
`fa3F@0.0.0` is not supported because:
    xFormers wasn't build with CUDA support
    operator wasn't built - see `python -m xformers.info` for more info
`fa2F@0.0.0` is not supported because:
    xFormers wasn't build with CUDA support"""
"""What xformers 0.0.35 says on a GPU when its kernels were built for another torch."""


@pytest.mark.parametrize("learns", [False, True])
def test_it_asks_xformers_for_a_kernel_and_refuses_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    dispatch = pytest.importorskip("xformers.ops.fmha.dispatch")
    asked: list[str] = []

    def forward(inputs: Any, needs_gradient: bool) -> None:
        q, k, v = inputs.query, inputs.key, inputs.value
        assert q.shape[:2] == (1, 9) and q.shape[2:] == k.shape[2:] == v.shape[2:] == (1, 8)
        assert needs_gradient == learns and type(inputs.attn_bias).__name__.startswith("Lower")
        asked.append("forward")

    def backward(*_: Any) -> None:
        asked.append("backward")
        raise NotImplementedError(REFUSAL)

    monkeypatch.setattr(dispatch, "_dispatch_fw", forward)
    monkeypatch.setattr(dispatch, "_dispatch_bw", backward)
    q, k = torch.zeros(1, 4, 9, 8, requires_grad=learns), torch.zeros(1, 2, 9, 8)
    found = _no_operator(Softmax(), Call(q, k, k, is_causal=True))
    assert asked == (["forward", "backward"] if learns else ["forward"])
    if not learns:
        assert found is None
        return
    assert found == (
        "xformers has no kernel for it (xFormers wasn't build with CUDA support; operator wasn't "
        "built - see python -m xformers.info for more info): install the xformers release that "
        "goes with this torch, or use sdpa"
    )
