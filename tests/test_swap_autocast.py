"""Mixed precision: under CPU autocast a swapped attention answers in the dtype that torch's own
does, as well as the reference in that dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import build_small, possible, small
from swap_layers import HEADS, NAMES, SIZE, gradients, layer, masks, padding, tokens
from torch import Tensor, nn

import attnzoo


def attention(name: str, backend: str = "auto") -> attnzoo.MultiheadAttention:
    torch.manual_seed(0)
    return attnzoo.MultiheadAttention(
        SIZE,
        HEADS,
        batch_first=True,
        attention=name,
        attention_options={**small(name), "backend": backend},
    )


def call(module: nn.Module, x: Tensor, **masks: bool) -> Tensor:
    return module(x, x, x, key_padding_mask=padding(), need_weights=False, **masks)[0]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_of_multihead_attention(name: str) -> None:
    masks = possible(attnzoo.describe(name).spec)
    x, exact = tokens(), call(attention(name), tokens(), **masks).detach()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = call(nn.MultiheadAttention(SIZE, HEADS, batch_first=True), x)
        ours, reference = (
            call(attention(name), x, **masks),
            call(attention(name, "reference"), x, **masks),
        )
        weights = attention(name)(x, x, x, **masks)[1]
    assert ours.dtype == theirs.dtype == torch.bfloat16 and weights.dtype == torch.bfloat16
    error, allowed = (float((out.detach().float() - exact).norm()) for out in (ours, reference))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("name", NAMES)
def test_autocast_of_a_swapped_layer(name: str) -> None:
    """Forward under autocast, backward outside of it, as a training loop does."""
    wanted, exact = gradients(
        layer(name).train(), (tokens(),), src_key_padding_mask=padding(), **masks(name)
    )
    results = []
    for backend in ("auto", "reference"):
        model = layer(name, backend=backend).train()
        with torch.autocast("cpu", torch.bfloat16):
            out, found = gradients(
                model, (tokens(),), src_key_padding_mask=padding(), **masks(name)
            )
        assert [gradient.dtype for gradient in found] == [torch.float32] * len(exact)
        results.append(
            (
                float((out.float() - wanted).norm()),
                [float((a - b).norm()) for a, b in zip(found, exact, strict=True)],
            )
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(None).train()(tokens()).dtype == out.dtype
    (error, errors), (allowed, all_allowed) = results
    assert 0 < error <= 2 * allowed
    assert sum(errors) <= 2 * sum(all_allowed)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_at_the_door_only(name: str) -> None:
    """float32 under autocast is that dtype without autocast, bit for bit, as for torch's SDPA:
    nothing inside is rounded once more."""
    attn = build_small(name, HEADS, 4)
    call: Any = possible(attn.spec)
    q, k, v = torch.randn(3, 2, HEADS, 20, 4, generator=torch.Generator().manual_seed(3))
    low, high = [x.bfloat16() for x in (q, k, v)], [x.double() for x in (q, k, v)]
    wanted, weights = attn(*low, **call), attn.weights(*low[:2], **call)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attn(q, k, v, **call), wanted) and torch.equal(
            attn.weights(q, k, **call), weights
        )
        assert torch.equal(attn(q, k=low[1], v=v, **call), wanted)  # a model may bring both
        assert attn(*high, **call).dtype == torch.float64
        if attn.spec.decodes:
            row, _ = attn.step(q, k, v, state=attn.init_state(2, dtype=torch.bfloat16))
            assert torch.equal(
                row, attn.step(*low, state=attn.init_state(2, dtype=torch.bfloat16))[0]
            )
