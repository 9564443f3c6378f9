"""The mask that xformers is given, laid out by xformers itself, against ours."""

from __future__ import annotations

import pytest
import torch

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import causal_mask
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.softmax.xformers_kernel import choose_bias, why_not


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
