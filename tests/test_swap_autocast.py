"""Mixed precision: under CPU autocast a swapped attention answers in the dtype that torch's own does, as well as the reference in that dtype."""

from __future__ import annotations

import pytest
import torch
from cases import form_of, small_options
from swap_layers import HEADS, NAMES, SIZE, gradients, layer, padding, tokens
from torch import Tensor, nn

import attnzoo


def attention(name: str, backend: str = "auto") -> attnzoo.MultiheadAttention:
    torch.manual_seed(0)
    return attnzoo.MultiheadAttention(SIZE, HEADS, batch_first=True, attention=name, attention_options={**small_options(name), "backend": backend})


def call(module: nn.Module, x: Tensor, **form: bool) -> Tensor:
    return module(x, x, x, key_padding_mask=padding(), need_weights=False, **form)[0]


@pytest.mark.parametrize("name", attnzoo.names())
def test_autocast_of_multihead_attention(name: str) -> None:
    form = form_of(name)
    x, exact = tokens(), call(attention(name), tokens(), **form).detach()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = call(nn.MultiheadAttention(SIZE, HEADS, batch_first=True), x)
        ours, reference = call(attention(name), x, **form), call(attention(name, "reference"), x, **form)
        weights = attention(name)(x, x, x, **form)[1]
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


@pytest.mark.parametrize("name", attnzoo.names())
def test_autocast_casts_at_the_door_only(name: str) -> None:
    """float32 under autocast is that dtype without autocast, bit for bit, as for torch's SDPA: nothing inside is rounded once more."""
    attn = attnzoo.build(name, heads=HEADS, head_dim=4, **small_options(name))
    q, k, v = torch.randn(3, 2, HEADS, 20, 4, generator=torch.Generator().manual_seed(3))
    low, high = [x.bfloat16() for x in (q, k, v)], [x.double() for x in (q, k, v)]
    form = form_of(name)
    wanted, weights = attn(*low, **form), attn.weights(*low[:2], **form)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attn(q, k, v, **form), wanted) and torch.equal(attn.weights(q, k, **form), weights)
        assert torch.equal(attn(q, k=low[1], v=v, **form), wanted)  # a model may bring both
        assert attn(*high, **form).dtype == torch.float64
        if attn.spec.decodes:
            row, _ = attn.step(q, k, v, state=attn.init_state(2, dtype=torch.bfloat16))
            assert torch.equal(row, attn.step(*low, state=attn.init_state(2, dtype=torch.bfloat16))[0])
