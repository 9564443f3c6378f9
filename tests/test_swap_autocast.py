"""Mixed precision: under CPU autocast a swapped attention answers in the dtype that torch's own does, as well as the reference in that dtype."""

from __future__ import annotations

import pytest
import torch
from swap_layers import HEADS, NAMES, OPTIONS, SIZE, gradients, layer, padding, tokens
from torch import Tensor, nn

import attnzoo


def attention(name: str, backend: str = "auto") -> attnzoo.MultiheadAttention:
    torch.manual_seed(0)
    return attnzoo.MultiheadAttention(SIZE, HEADS, batch_first=True, attention=name, attention_options={**OPTIONS.get(name, {}), "backend": backend})


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, key_padding_mask=padding(), need_weights=False)[0]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_of_multihead_attention(name: str) -> None:
    x, exact = tokens(), call(attention(name), tokens()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = call(nn.MultiheadAttention(SIZE, HEADS, batch_first=True), x)
        ours, reference = call(attention(name), x), call(attention(name, "reference"), x)
        weights = attention(name)(x, x, x)[1]
    assert ours.dtype == theirs.dtype == torch.bfloat16 and weights.dtype == torch.bfloat16
    error, allowed = (float((out.detach().float() - exact).norm()) for out in (ours, reference))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("name", NAMES)
def test_autocast_of_a_swapped_layer(name: str) -> None:
    """Forward under autocast, backward outside of it, as a training loop does."""
    wanted, exact = gradients(layer(name).train(), (tokens(),), src_key_padding_mask=padding())
    results = []
    for backend in ("auto", "reference"):
        model = layer(name, backend=backend).train()
        with torch.autocast("cpu", torch.bfloat16):
            out, found = gradients(model, (tokens(),), src_key_padding_mask=padding())
        assert [gradient.dtype for gradient in found] == [torch.float32] * len(exact)
        results.append((float((out.float() - wanted).norm()), [float((a - b).norm()) for a, b in zip(found, exact, strict=True)]))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(None).train()(tokens()).dtype == out.dtype
    (error, errors), (allowed, all_allowed) = results
    assert 0 < error <= 2 * allowed
    assert sum(errors) <= 2 * sum(all_allowed)
